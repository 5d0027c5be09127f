"""The engine contract: torch, ONNX Runtime and TensorRT alike."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from robustkd.errors import ArtifactError

Images = NDArray[np.float32]
"""(N, C, H, W) in [0, 1]."""
Logits = NDArray[np.float32]
"""(N, K)."""


class EngineInfo(BaseModel, frozen=True):
    """What ran, exactly: recorded with every audit, because runtime settings change low-precision results."""

    runtime: str
    runtime_version: str
    precision: str
    device: str
    input_shape: tuple[int, int, int]
    classes: int
    max_batch: int | None = None
    settings: dict[str, Any] = {}


class Engine(Protocol):
    """Images in [0, 1] to logits, any number at a time; a context manager. NumPy in and out: a board has no torch."""

    info: EngineInfo

    def logits(self, x: Images) -> Logits:
        """(N, C, H, W) float32 in [0, 1] -> (N, K) float32, any N including 0; a fresh array each time."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def check_images(x: NDArray[Any], info: EngineInfo) -> None:
    """Refuse what the engine does not take, before a runtime words it in its own way.

    Raises:
        ArtifactError: not float32, or not (N, C, H, W) with the engine's C, H and W.
    """
    if x.ndim != 4 or x.shape[1:] != info.input_shape:
        wanted = ", ".join(map(str, info.input_shape))
        raise ArtifactError(
            f"images have shape {x.shape}, the engine takes (N, {wanted})",
            where=info.runtime,
            fix="use the data set the model was trained on, or the engine of another model",
        )
    if x.dtype != np.float32:
        raise ArtifactError(
            f"images are {x.dtype}, the engine takes float32 in [0, 1]",
            where=info.runtime,
            fix="divide uint8 pixels by 255 and convert to float32",
        )
