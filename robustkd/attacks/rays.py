"""RayS: looks for the direction of the nearest boundary with the engine's decisions alone; made for linf.

Chen and Gu, "RayS: A Ray Searching Method for Hard-label Adversarial Attack", KDD 2020, algorithm 3 (hierarchical): a
direction is one sign per value, blocks of signs are turned round, from the whole image down to single values, and a
turned direction is kept where the boundary along it is nearer. It has no randomness and no gradient.

Departures: an image leaves as soon as its boundary lies inside the ball; a decision without a strictly positive margin,
or without a finite answer, counts as crossed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.losses import margin
from robustkd.threat import ThreatModel, per_image

#: halvings of the distance along one direction: to 1/1000 of a pixel's range, as the authors search
HALVINGS = 10


class RayS(Attack, frozen=True):
    """Decision-based search over sign directions."""

    summary: ClassVar[str] = "decision-based search over sign directions, reads only labels; linf"
    needs: ClassVar[Literal["gradient", "logits", "labels"]] = "labels"
    per_image: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    name: Literal["rays"] = "rays"
    queries: int = Field(1000, ge=1, description="per image, at most")

    @torch.no_grad()
    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        search = _Rays(model, x, y, self.queries)
        search.try_all(torch.ones_like(x), torch.arange(len(x), device=x.device))
        values, level, block = x[0].numel(), 0, 0
        while bool((live := search.live(threat.eps)).any()):
            index = live.nonzero().flatten()
            size = -(-values // 2**level)
            turned = search.sign[index].flatten(1).clone()
            turned[:, block * size : (block + 1) * size] *= -1
            search.try_all(turned.view_as(x[index]), index)
            block += 1
            if block == 2**level or block * size >= values:
                level, block = (level + 1, 0) if size > 1 else (0, 0)
        return search.found()


class _Rays:
    """For each image the best direction so far and the distance to the boundary along it."""

    def __init__(self, model: Guard, x: Tensor, y: Tensor, queries: int) -> None:
        self._model, self._x, self._y, self._limit = model, x, y, queries
        self.sign = torch.ones_like(x)
        self._distance = x.new_full((len(x),), torch.inf)
        self._used = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def live(self, eps: float) -> Tensor:
        """Images whose boundary was not found inside the ball, and that have queries left."""
        return (self._distance > eps) & (self._used < self._limit)

    def found(self) -> Tensor:
        """The image at the boundary, or the clean one where none was found."""
        reach = self._distance.where(self._distance.isfinite(), torch.zeros_like(self._distance))
        return self._at(reach, self.sign, torch.arange(len(self._x), device=self._x.device))

    def try_all(self, sign: Tensor, index: Tensor) -> None:
        """Keep a direction where the boundary along it is nearer than the best so far, to a thousandth."""
        reach = self._distance[index].clamp_max(1.0)
        index, sign, high = _where(self._crossed(reach, sign, index), index, sign, reach)
        low = torch.zeros_like(high)
        for _ in range(HALVINGS):
            on = self._used[index] < self._limit  # out of queries: the nearest crossing so far counts
            if not bool(on.any()):
                break
            middle = ((low + high) / 2)[on]
            crossed = self._crossed(middle, sign[on], index[on])
            high[on], low[on] = torch.where(crossed, middle, high[on]), torch.where(crossed, low[on], middle)
        nearer = high < self._distance[index]
        self._distance[index[nearer]], self.sign[index[nearer]] = high[nearer], sign[nearer]

    def _at(self, reach: Tensor, sign: Tensor, index: Tensor) -> Tensor:
        return (self._x[index] + per_image(reach, sign) * sign).clamp(0, 1)

    def _crossed(self, reach: Tensor, sign: Tensor, index: Tensor) -> Tensor:
        self._used[index] += 1
        return margin(self._model(self._at(reach, sign, index)), self._y[index]) <= 0


def _where(flags: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[flags] for tensor in tensors)


ENTRY = RayS
