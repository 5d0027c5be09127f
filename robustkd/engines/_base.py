"""The engine contract: torch, ONNX Runtime and TensorRT alike."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

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
