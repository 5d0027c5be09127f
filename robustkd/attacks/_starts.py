"""Random starts that belong to an image: the same whatever batch, order or shard it is attacked in."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkd.attacks._streams import Streams, shares
from robustkd.threat import ThreatModel, per_image

Whose = Literal["image", "batch"]
"""Whose stream a start is drawn from: the image's own, or one for the whole batch, as the authors of Auto-PGD draw it."""


class Starts:
    """Draws for each image of a batch, on the CPU, so that devices agree.

    Args:
        x: the clean images (N, C, H, W).
        seed: of the attack.
    """

    def __init__(self, x: Tensor, seed: int) -> None:
        self._x, self._streams = x, Streams(x, seed)

    def uniform(self, draw: int) -> Tensor:
        """Draw number `draw`: uniform in [-1, 1) for every pixel, in the shape of the images."""
        return self._shaped(2 * shares(self._streams.words(2 * draw, self._pixels)) - 1)

    def normal(self, draw: int) -> Tensor:
        """Draw number `draw`: standard normal for every pixel (Box and Muller, 1958)."""
        radius = np.sqrt(-2 * np.log1p(-shares(self._streams.words(2 * draw, self._pixels))))
        return self._shaped(radius * np.cos(2 * np.pi * shares(self._streams.words(2 * draw + 1, self._pixels))))

    def inside(self, draw: int, threat: ThreatModel) -> Tensor:
        """Draw number `draw`: a point uniform in the ball around each image, not cut to [0, 1]."""
        if threat.norm == "linf":
            return self._x + threat.eps * self.uniform(draw)
        share = torch.from_numpy(shares(self._streams.words(2 * draw + 1, self._pixels + 1)[:, -1:])).to(self._x)
        radius = per_image(share.flatten() ** (1 / self._pixels), self._x)
        return self._x + threat.eps * radius * threat.step(self.normal(draw))

    @property
    def _pixels(self) -> int:
        return max(1, self._x[0].numel()) if len(self._x) else 1

    def _shaped(self, values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(self._x).view_as(self._x)
