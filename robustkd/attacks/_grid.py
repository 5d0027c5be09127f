"""The 8-bit grid: cameras and image files know only k / 255, so an attack that needs finer steps may not survive them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from robustkd.threat import SLACK, ThreatModel, per_image

LEVELS = 255
#: part of a level by which float32 may misplace a limit
_ROUNDING = 1e-4
#: tries with which rounding in an l2 ball moves back towards the image
_SHRINKS = 20


def on_grid(z: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Images (N, C, H, W) as 8-bit images inside the ball around x.

    In linf each pixel goes to the nearest level between ceil((x - eps) * 255) and floor((x + eps) * 255), so that it
    also stays inside where eps is no multiple of 1/255. In l2 images are rounded, and moved towards x where that left
    the ball. Where the ball holds no 8-bit image, x itself is returned.
    """
    if threat.norm == "linf":
        low = ((x.double() - threat.eps) * LEVELS - _ROUNDING).ceil().clamp_min(0)
        high = ((x.double() + threat.eps) * LEVELS + _ROUNDING).floor().clamp_max(LEVELS)
        level = (z.double() * LEVELS).round().maximum(low).minimum(high)
        empty = (low > high).flatten(1).any(1)
        return torch.where(per_image(empty, x), x, _pixels(level))
    found, inside = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for part in range(_SHRINKS + 1):
        tried = _pixels(((x + (1 - part / _SHRINKS) * (z - x)).double() * LEVELS).round().clamp(0, LEVELS))
        now = ~inside & (threat.distance(tried, x) <= threat.eps + SLACK)
        found, inside = torch.where(per_image(now, x), tried, found), inside | now
        if bool(inside.all()):
            break
    return found


def anchored(x: Tensor, threat: ThreatModel) -> tuple[Tensor, ThreatModel]:
    """The 8-bit image next to x, and a ball around it whose 8-bit images all lie in the ball around x."""
    anchor = _pixels((x.double() * LEVELS).round())
    away = float(threat.distance(anchor, x).max()) if len(x) else 0.0
    radius = max(0.0, threat.eps - (away if away > SLACK else 0.0))
    if threat.norm == "linf":
        radius = math.floor(radius * LEVELS + _ROUNDING) / LEVELS
    return anchor, threat.model_copy(update={"eps": radius})


def rounding(z: Tensor) -> Tensor:
    """The nearest 8-bit image, with the gradient of the identity (straight through)."""
    rounded: Tensor = _Round.apply(z)
    return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return _pixels((z.double() * LEVELS).round().clamp(0, LEVELS))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _pixels(level: Tensor) -> Tensor:
    """Levels to float32 in [0, 1], bit by bit as an 8-bit image is read."""
    return level.float() / LEVELS
