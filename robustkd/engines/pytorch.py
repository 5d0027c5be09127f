"""A torch network behind the engine contract: the source that an exported file is held against."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import TracebackType
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from robustkd.engines._base import EngineInfo, Images, Logits, check_images
from robustkd.errors import ConfigError, RequirementError


@contextmanager
def evaluating(net: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode; afterwards every module is in the mode it was in."""
    trained = [module for module in net.modules() if module.training]
    if trained:  # a walk for each single image would cost more than a small network
        net.eval()
    try:
        yield net
    finally:
        for module in trained:
            module.training = True


def device_of(net: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU where it has none."""
    return next((t.device for t in chain(net.parameters(), net.buffers())), torch.device("cpu"))


def chosen(device: str) -> torch.device:
    """The device of a name: `cpu`, `cuda`, `cuda:1`, or `auto`, a GPU where there is one.

    Raises:
        ConfigError: no device has this name.
        RequirementError: it is a GPU, and torch sees none here.
    """
    there = torch.cuda.is_available()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"there is no device {device}", where=f"device {device}", fix="say cpu, cuda, cuda:1 or auto")
    if device.startswith("cuda") and not there:
        raise RequirementError(
            f"torch {torch.__version__} sees no GPU here",
            where=f"device {device}",
            fix="see `robustkd doctor`; or take the CPU",
        )
    return torch.device(("cuda" if there else "cpu") if device == "auto" else device)


@contextmanager
def full_products() -> Iterator[None]:
    """Products and convolutions in all of float32: TF32, which torch leaves on for convolutions, keeps 10 bits of it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    without_tf32()
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def without_tf32() -> None:
    """`full_products` from here to the end of the process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


class PytorchEngine:
    """Runs a torch network in eval mode, without gradients, in chunks.

    Args:
        net: (N, C, H, W) in [0, 1] -> logits (N, K), on any device.
        input_shape: C, H, W.
        classes: K.
        precision: of the weights, for the record.
        chunk: images per forward pass; bounds the memory, does not change the logits.
    """

    summary: ClassVar[str] = "a checkpoint through torch; the source an exported file is held against"

    def __init__(
        self,
        net: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        precision: str = "fp32",
        chunk: int = 256,
    ) -> None:
        self.net, self._chunk = net, chunk
        self._device = device_of(net)
        self.info = EngineInfo(
            runtime="pytorch",
            runtime_version=str(torch.__version__),
            precision=precision,
            device=self._device_name(),
            input_shape=input_shape,
            classes=classes,
            settings=self._settings(),
        )

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type

    def _settings(self) -> dict[str, bool | int]:
        if self._device.type != "cuda":
            return {"threads": torch.get_num_threads()}
        # TF32 rounds the inputs of products to 10 bits: part of what was measured
        return {"tf32_matmul": torch.backends.cuda.matmul.allow_tf32, "tf32_cudnn": torch.backends.cudnn.allow_tf32}

    def logits(self, x: Images) -> Logits:
        """(N, C, H, W) float32 in [0, 1] -> (N, K) float32.

        Raises:
            ArtifactError: the images have another shape or type.
        """
        check_images(x, self.info)
        out = np.empty((len(x), self.info.classes), np.float32)
        with evaluating(self.net), torch.no_grad():
            for start in range(0, len(x), self._chunk):
                part = slice(start, start + self._chunk)
                # a copy of its own: the net may write in place, and torch takes no negative strides, which numpy calls
                # contiguous where there is one image only
                images = torch.from_numpy(np.array(x[part], order="C")).to(self._device)
                out[part] = self.net(images).float().cpu().numpy()
        return out

    def __enter__(self) -> PytorchEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


ENTRY = PytorchEngine
