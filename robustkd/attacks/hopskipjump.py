"""HopSkipJump: walks along the decision boundary towards the image, by the engine's decisions alone; linf and l2.

Chen, Jordan and Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", IEEE S&P 2020, algorithm 2
with the geometric progression of the step: bisect to the boundary, estimate its normal from the decisions on random
probes (their mean subtracted), step along it, and bisect again. Schedules are those of the authors' code.

Departures: no probe is shorter than one level of 8 bit per value (`FINEST`); every other starting draw is coarse noise, as
fine noise is one and the same class to many networks; the randomness of an image is that of the seed and of the image
alone; an image leaves as soon as a point inside its ball was seen to cross, and the nearest point ever seen is returned;
a decision without a strictly positive margin, or without a finite answer, counts as crossed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.losses import margin
from robustkd.threat import ThreatModel

Pixels = NDArray[np.float32]
Rows = NDArray[np.int64]
Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]

#: random images tried as a start
DRAWS = 100
#: cells along the side of a coarse starting image, in turn
CELLS = (1, 2, 4, 8)
#: part of the way to the start at which its bisection stops
BLEND = 1e-3
#: probes of one estimate at most
CAP = 10_000
#: length of the first probes
FIRST = 0.1
#: least root mean square of a probe, per value: one level of 8 bit. Below it a quantised engine answers by its levels,
#: and its normal cannot be seen; the schedule's own lengths reach down to the rounding of float32
FINEST = 1 / 255
#: width below which no bisection goes: the resolution of float32
NARROW = 1e-7
#: halvings of a step before the walk stays where it is
HALVINGS = 25
#: images in one call of the model, and values in a quarter of it
CALL, VALUES = 256, 2**22


class HopSkipJump(Attack, frozen=True):
    """Decision-based walk along the boundary."""

    summary: ClassVar[str] = "decision-based walk along the boundary by estimates of its normal, reads only labels"
    needs: ClassVar[Literal["gradient", "logits", "labels"]] = "labels"
    per_image: ClassVar[bool] = True
    name: Literal["hopskipjump"] = "hopskipjump"
    queries: int = Field(5000, ge=1, description="per image, at most")
    probes: int = Field(100, ge=1, le=CAP, description="of the first estimate; the k-th has sqrt(k) times as many")

    @torch.no_grad()
    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        walk = _Walk(model, x, y, threat, seed, self.queries)
        at, reach = walk.start()
        started, k = np.flatnonzero(np.isfinite(reach)), 0
        while len(rows := walk.live(started)):
            k += 1
            probes = np.minimum(min(int(self.probes * math.sqrt(k)), CAP), walk.spare(rows))
            normal = walk.normal(rows, at[rows], None if k == 1 else reach[rows], probes)
            moved = walk.stride(rows, at[rows], normal, k)
            at[rows], reach[rows] = walk.approach(rows, moved)
        return walk.found()


class _Walk:
    """For each image the nearest crossing seen, its queries and its stream; asks the model for decisions."""

    def __init__(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, queries: int) -> None:
        self._model, self._like, self._y, self._eps, self._limit = model, x, y, threat.eps, queries
        self._box = threat.norm == "linf"
        self._x: Pixels = x.cpu().numpy()
        self._d = self._x[0].size
        self._best, self._nearest = self._x.copy(), np.full(len(x), np.inf)
        self._used = np.zeros(len(x), np.int64)
        self._streams = [np.random.default_rng((seed & 0xFFFFFFFF, zlib.crc32(image.tobytes()))) for image in self._x]

    def live(self, rows: Rows) -> Rows:
        """Those without a crossing inside the ball that have queries left."""
        found: Rows = rows[(self._nearest[rows] > self._eps) & (self._used[rows] < self._limit)]
        return found

    def spare(self, rows: Rows) -> Rows:
        """How many probes leave an image a quarter of its queries for the way back to the boundary."""
        found: Rows = np.maximum(1, (self._limit - self._used[rows]) * 3 // 4)
        return found

    def found(self) -> Tensor:
        """The nearest crossing, or the clean image where none was found."""
        return torch.from_numpy(self._best).to(self._like)

    def start(self) -> tuple[Pixels, Reals]:
        """A point near the boundary for every image, and how far it was before the last bisection: inf, none found."""
        far, reach = self._x.copy(), np.full(len(self._x), np.inf)
        found = np.zeros(len(far), np.bool_)
        for draw in range(DRAWS):
            rows = self.live(np.flatnonzero(~found))
            if not len(rows):
                break
            tried = np.stack([self._noise(row, draw) for row in rows])
            crossed = self._ask(rows, tried)
            far[rows[crossed]], found[rows[crossed]] = tried[crossed], True
        rows = np.flatnonzero(found)
        near = self._bisect(rows, far[rows], np.ones(len(rows)), np.full(len(rows), BLEND), box=False)
        far[rows], reach[rows] = self.approach(rows, near)
        return far, reach

    def approach(self, rows: Rows, far: Pixels) -> tuple[Pixels, Reals]:
        """Bisect from crossed points to the boundary; the points there, and the distances of those it began with."""
        reach, d = self._distance(rows, far), self._d
        if self._box:
            return self._bisect(rows, far, reach, np.maximum(np.minimum(reach, 1.0) / d**2, NARROW), box=True), reach
        width = np.full(len(rows), max(d**-1.5, NARROW))
        return self._bisect(rows, far, np.ones(len(rows)), width, box=False), reach

    def normal(self, rows: Rows, at: Pixels, reach: Reals | None, probes: Rows) -> Pixels:
        """The direction of the normal at boundary points, of length 1; its signs for linf.

        Args:
            rows: of the images.
            at: points (M, C, H, W) on the boundary.
            reach: their distances, which set the length of the probes; none for the first estimate.
            probes: random points around each whose decisions are asked.
        """
        length = np.maximum(FIRST if reach is None else reach / self._d, FINEST * math.sqrt(self._d)) + np.zeros(len(rows))
        over, every, crossings = np.zeros_like(at), np.zeros_like(at), np.zeros(len(rows))
        for blocks in self._blocks(probes):
            points = [self._around(rows[i], at[i], length[i], size) for i, size in blocks]
            crossed = self._ask(np.repeat(rows[[i for i, _ in blocks]], [size for _, size in blocks]), np.concatenate(points))
            first = 0
            for (i, size), near in zip(blocks, points, strict=True):
                flags, moved = crossed[first : first + size], near - at[i]
                first += size
                over[i] += moved[flags].sum(0)
                every[i] += moved.sum(0)
                crossings[i] += flags.sum()
        share = _wide(crossings / probes, at)
        found = np.where(share == 1, every, np.where(share == 0, -every, over - share * every))
        return _small(np.sign(found) if self._box else found / _wide(np.maximum(_length(found), 1e-30), at))

    def stride(self, rows: Rows, at: Pixels, normal: Pixels, k: int) -> Pixels:
        """The longest step along the normal, halved until it crosses, from points on the boundary; k counts the steps."""
        moved: Pixels = at.copy()
        size, waiting = self._distance(rows, at) / math.sqrt(k), np.ones(len(rows), np.bool_)
        for _ in range(HALVINGS):
            on = np.flatnonzero(waiting & np.isin(rows, self.live(rows)))
            if not len(on):
                break
            tried = _clip(at[on] + _wide(size[on], at) * normal[on])
            crossed = self._ask(rows[on], tried)
            moved[on[crossed]], waiting[on[crossed]] = tried[crossed], False
            size /= 2
        return moved

    def _bisect(self, rows: Rows, far: Pixels, high: Reals, width: Reals, *, box: bool) -> Pixels:
        """The last crossed point between the images and crossed points: cut by a box around the image, or blended."""
        edge: Pixels = far.copy()
        low, high = np.zeros(len(rows)), high.copy()
        while len(on := np.flatnonzero((high - low > width) & np.isin(rows, self.live(rows)))):
            middle, x = (low[on] + high[on]) / 2, self._x[rows[on]]
            wide = _wide(middle, x)
            tried = _clip(np.clip(far[on], x - wide, x + wide) if box else (1 - wide) * x + wide * far[on])
            crossed = self._ask(rows[on], tried)
            edge[on[crossed]], high[on[crossed]], low[on[~crossed]] = tried[crossed], middle[crossed], middle[~crossed]
        return edge

    def _blocks(self, probes: Rows) -> Iterator[list[tuple[int, int]]]:
        """What one call holds: images by their place, and probes of each. An image's blocks depend on it alone."""
        size = max(1, min(CALL // 4, VALUES // self._d))
        blocks = [(i, min(size, n - first)) for i, n in enumerate(probes.tolist()) for first in range(0, n, size)]
        waiting: list[tuple[int, int]] = []
        for block in blocks:
            if sum(n for _, n in waiting) + block[1] > 4 * size:
                yield waiting
                waiting = []
            waiting.append(block)
        yield waiting

    def _around(self, row: int, at: Pixels, length: float, n: int) -> Pixels:
        """`n` random points at a distance from one point, in the range of images."""
        shape, stream = (n, *at.shape), self._streams[row]
        drawn = 2 * stream.random(shape, np.float32) - 1 if self._box else stream.standard_normal(shape, np.float32)
        return _clip(at + _small(_wide(length / _length(drawn), drawn)) * drawn)

    def _noise(self, row: int, draw: int) -> Pixels:
        """A random image to start from: of single pixels, or of cells."""
        channels, height, width = self._x.shape[1:]
        if draw % 2 == 0:
            return self._streams[row].random((channels, height, width), np.float32)
        cells = CELLS[draw // 2 % len(CELLS)]
        drawn = self._streams[row].random((channels, cells, cells), np.float32)
        down, across = (np.arange(side) * cells // side for side in (height, width))
        return _small(drawn[:, down][:, :, across])

    def _distance(self, rows: Rows, z: Pixels) -> Reals:
        delta = z.astype(np.float64) - self._x[rows]
        furthest: Reals = np.abs(delta).max((1, 2, 3), initial=0.0)
        return furthest if self._box else _length(delta)

    def _ask(self, rows: Rows, z: Pixels) -> Flags:
        """Whether points cross the boundary of their images; the nearest that does is kept."""
        parts = [self._answers(rows[first : first + CALL], z[first : first + CALL]) for first in range(0, len(z), CALL)]
        crossed: Flags = np.concatenate([np.zeros(0, np.bool_), *parts])
        np.add.at(self._used, rows, 1)
        mine, points = rows[crossed], z[crossed]
        far = self._distance(mine, points)
        order = np.lexsort((far, mine))
        order = order[np.unique(mine[order], return_index=True)[1]]  # of each image the nearest
        order = order[far[order] < self._nearest[mine[order]]]
        self._nearest[mine[order]], self._best[mine[order]] = far[order], points[order]
        return crossed

    def _answers(self, rows: Rows, z: Pixels) -> Flags:
        labels = self._y[torch.from_numpy(rows).to(self._y.device)]
        crossed: Flags = (margin(self._model(torch.from_numpy(z).to(self._like)), labels) <= 0).cpu().numpy()
        return crossed


def _clip(z: NDArray[Any]) -> Pixels:
    return _small(np.clip(z, 0, 1))


def _small(values: NDArray[Any]) -> Pixels:
    found: Pixels = values.astype(np.float32)
    return found


def _wide(values: Reals, like: Pixels) -> Reals:
    """One value for each image, shaped to broadcast over it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _length(delta: NDArray[Any]) -> Reals:
    """The l2 norm of each image."""
    flat = delta.reshape(len(delta), math.prod(delta.shape[1:]))
    found: Reals = np.sqrt((flat * flat).sum(1, dtype=np.float64))
    return found


ENTRY = HopSkipJump
