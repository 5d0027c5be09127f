"""Where and how a benchmark runs: device, precision, and which of its cases."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch


@dataclass(frozen=True)
class Place:
    """What the command line says.

    Attributes:
        device: `cpu` or `cuda`.
        precision: of our training step; the reference is always fp32. `bf16` leaves the attack in fp32, as the product
            does unless told otherwise; `bf16-attack` has both in bf16, and finds other adversarial images.
        speed: `train.speed` of our training step.
        batch: images in a training step on the papers' networks; 0: as many as `bench.sizes` says.
        pairs: how often both sides of a training step are timed; 0: as often as `bench.step` says.
        only: patterns of case names; one must fit.
    """

    device: str = "cpu"
    precision: str = "fp32"
    speed: str = "auto"
    batch: int = 0
    pairs: int = 0
    only: tuple[str, ...] = ("*",)

    def wants(self, case: str) -> bool:
        """Whether a case is asked for."""
        return any(fnmatchcase(case, pattern) for pattern in self.only)

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


HERE = Place()
