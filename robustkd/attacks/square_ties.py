"""Square for engines with coarse outputs: ties count as broken, plateaus are crossed, every image has its own stream.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020,
algorithm 1 with the linf sampling of algorithm 2, on the margin loss.

Departures from the authors' code: a proposal of equal margin is accepted (the outputs of an int8 engine are
plateaus, on which strict improvement stands still); success is a margin that is not strictly positive, as the audit
judges; the randomness of an image is a hash of the seed, of the image and of the query, so that batch, order and shard
cannot change a result; broken images leave the batch at once.
"""

from __future__ import annotations

import math
import zlib
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.losses import margin
from robustkd.threat import ThreatModel

Words = NDArray[np.uint64]

#: queries from which on the side of the square is halved in area again, for a budget of 10,000
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class SquareTies(Attack, frozen=True):
    """Score-based random search that is not stopped by ties and plateaus."""

    summary: ClassVar[str] = "Square of our own for coarse outputs: ties are broken images, equal margins are accepted; linf"
    needs: ClassVar[Literal["gradient", "logits", "labels"]] = "logits"
    per_image: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    name: Literal["square-ties"] = "square-ties"
    queries: int = Field(5000, ge=1)
    p_init: float = Field(0.8, gt=0, le=1, description="part of the image that the first squares cover")
    accept_equal: bool = Field(True, description="take a proposal that is no worse; the authors' code wants a better one")

    @torch.no_grad()
    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        streams = Streams(x, seed)
        channels, height, width = x.shape[1:]
        stripes = streams.signs(0, channels * width).view(-1, channels, 1, width).to(x)
        best = (x + threat.eps * stripes).clamp(0, 1)
        lowest = margin(model(best), y)
        for query in range(1, self.queries + 1):
            live = (lowest > 0).nonzero().flatten()
            if not len(live):
                break
            side = _side(self.p_init, query - 1, height, width)
            change = streams.squares(query, live, channels, side, (height, width)).to(x)
            tried = _inside(best[live] + 2 * threat.eps * change, x[live], threat.eps)
            found = margin(model(tried), y[live])
            better = (found <= lowest[live]) if self.accept_equal else (found < lowest[live]) | (found <= 0)
            taken = live[better]
            best[taken], lowest[taken] = tried[better], found[better]
        return best


def _side(p_init: float, query: int, height: int, width: int) -> int:
    """The side of the square of one query: its area halves on the authors' schedule."""
    halvings = sum(query > limit for limit in HALVINGS)
    side = max(round(math.sqrt(p_init / 2**halvings * height * width)), 1)
    return min(side, height, width)


def _inside(z: Tensor, x: Tensor, eps: float) -> Tensor:
    return z.maximum(x - eps).minimum(x + eps).clamp(0, 1)


class Streams:
    """Random numbers of each image: a hash of the seed, the image's bytes, the query and a counter.

    Args:
        x: the clean images.
        seed: of the attack.
    """

    def __init__(self, x: Tensor, seed: int) -> None:
        images = x.detach().cpu().numpy()
        keys = [(zlib.crc32(image.tobytes()) << 32) ^ (seed & 0xFFFFFFFF) for image in images]
        self._keys = _mix(np.asarray(keys, np.uint64))

    def words(self, query: int, n: int) -> Words:
        """`n` words of 64 random bits for every image, (N, n)."""
        with np.errstate(over="ignore"):
            counter = np.arange(n, dtype=np.uint64) + np.uint64(query) * np.uint64(1 << 20)
            return _mix(self._keys[:, None] + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))

    def signs(self, query: int, n: int) -> Tensor:
        """`n` signs for every image, (N, n)."""
        return torch.from_numpy(np.where(self.words(query, n) >> np.uint64(63), 1.0, -1.0).astype(np.float32))

    def squares(self, query: int, live: Tensor, channels: int, side: int, size: tuple[int, int]) -> Tensor:
        """A square of one sign per channel at a random place, zero around it, for each live image."""
        words = self.words(query, channels + 2)[live.cpu().numpy()]
        signs = torch.from_numpy(np.where(words[:, 2:] >> np.uint64(63), 1.0, -1.0).astype(np.float32))
        inside = []
        for word, length in zip(words[:, :2].T, size, strict=True):
            first = place(word, length - side)[:, None]
            steps = np.arange(length)[None]
            inside.append(torch.from_numpy((steps >= first) & (steps < first + side)))
        mask = inside[0][:, :, None] & inside[1][:, None, :]
        return signs[:, :, None, None] * mask[:, None]


def place(word: Words, last: int) -> NDArray[np.int64]:
    """A position in 0..last - 1 (0 where there is but one), as the authors' code draws it."""
    share = (word >> np.uint64(11)).astype(np.float64) / 2.0**53
    first: NDArray[np.int64] = np.floor(share * last).astype(np.int64)
    return first


def _mix(word: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Words = word ^ (word >> np.uint64(31))
    return mixed


ENTRY = SquareTies
