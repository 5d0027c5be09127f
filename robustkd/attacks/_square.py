"""What Square tries: stripes and squares in linf, tiles and pairs of windows in l2, with the randomness of each image.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020,
algorithms 2 and 3; details as in the authors' code (PyPI: pyautoattack).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkd.attacks._streams import Streams, Words, place, signs

Doubles = NDArray[np.float64]

#: queries from which on the side of the square is halved in area again, for a budget of 10,000
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


class Moves(Protocol):
    """How the search begins and what it tries next."""

    def start(self) -> Tensor:
        """A first image for each clean one, (N, C, H, W), in the ball and in [0, 1]."""

    def tried(self, query: int, live: Tensor, best: Tensor) -> Tensor:
        """The proposals of a query, counted from 1, for the images `live` of which `best` are the best so far."""


class Squares:
    """linf: a square of one sign per channel moves to the other end of the ball.

    Args:
        x: the clean images.
        eps: of the ball.
        p_init: part of the image that the first squares cover.
        streams: the randomness.
    """

    def __init__(self, x: Tensor, eps: float, p_init: float, streams: Streams) -> None:
        self._x, self._eps, self._p, self._streams = x, eps, p_init, streams

    def start(self) -> Tensor:
        """Vertical stripes of one sign."""
        channels, _, width = self._x.shape[1:]
        stripes = self._streams.signs(0, channels * width).view(-1, channels, 1, width).to(self._x)
        return (self._x + self._eps * stripes).clamp(0, 1)

    def tried(self, query: int, live: Tensor, best: Tensor) -> Tensor:
        """A square at a random place of each image."""
        channels, height, width = self._x.shape[1:]
        length = side(self._p, query - 1, height, width)
        words = self._streams.words(query, channels + 2)[live.cpu().numpy()]
        squares = signs(words[:, 2:])[:, :, None, None] * _window(words[:, :2], length, height, width)[:, None]
        z = best + 2 * self._eps * torch.from_numpy(squares.astype(np.float32)).to(best)
        return z.maximum(self._x[live] - self._eps).minimum(self._x[live] + self._eps).clamp(0, 1)


class Windows:
    """l2: a window gets a new pattern and the norm that another one loses; what is left of eps goes there as well.

    All sums are numpy's, over one image at a time: torch divides a sum among threads by the size of the batch.

    Args:
        x: the clean images.
        eps: of the ball.
        p_init: part of the image that the first windows cover.
        streams: the randomness.
    """

    def __init__(self, x: Tensor, eps: float, p_init: float, streams: Streams) -> None:
        self._like, self._x = x, x.cpu().numpy().astype(np.float64)
        self._eps, self._p, self._streams = eps, p_init, streams

    def start(self) -> Tensor:
        """A grid of patterns, about five a side; unlike the authors' it reaches the edge in images of under 25 pixels too."""
        n, channels, height, width = self._x.shape
        length = max(1, min(height, width) // 5)
        tops, lefts = (range(size % length // 2, size - length + 1, length) for size in (height, width))
        words = self._streams.words(0, len(tops) * len(lefts) * (channels + 1)).reshape(n, -1, channels + 1)
        delta = np.zeros_like(self._x)
        for i, (top, left) in enumerate((top, left) for top in tops for left in lefts):
            delta[:, :, top : top + length, left : left + length] = _patterns(length, words[:, i])
        return self._image(delta, self._x)

    def tried(self, query: int, live: Tensor, best: Tensor) -> Tensor:
        """A window of each image, and the one that pays for it."""
        channels, height, width = self._x.shape[1:]
        length = _odd_side(self._p, query - 1, height, width)
        rows = live.cpu().numpy()
        words, x = self._streams.words(query, channels + 5)[rows], self._x[rows]
        delta = best.cpu().numpy().astype(np.float64) - x
        to, off = (_window(words[:, at : at + 2], length, height, width)[:, None] for at in (0, 2))
        held = _length(delta * (to | off))
        left = np.maximum(self._eps**2 - _length(delta.reshape(len(x), 1, 1, -1)) ** 2, 0) / channels
        old = delta[np.broadcast_to(to, delta.shape)].reshape(len(x), channels, length, length)
        new = _patterns(length, words[:, 4:]) + old / (_TINY + _length(old))
        new *= np.sqrt(left + held**2) / (_TINY + _length(new))
        delta[np.broadcast_to(off, delta.shape)] = 0
        delta[np.broadcast_to(to, delta.shape)] = new.ravel()
        return self._image(delta, x)

    def _image(self, delta: Doubles, x: Doubles) -> Tensor:
        whole = _length(delta.reshape(len(x), 1, 1, -1))
        images = np.clip(x + delta / (_TINY + whole) * self._eps, 0, 1).astype(np.float32)
        return torch.from_numpy(images).to(self._like)


def side(p_init: float, query: int, height: int, width: int) -> int:
    """The side of the square of one query, counted from 0: its area halves on the authors' schedule."""
    return min(max(_whole(p_init, query, height, width), 1), height, width)


def _odd_side(p_init: float, query: int, height: int, width: int) -> int:
    """In l2 odd and at least 3, as far as the image allows."""
    return min(max(_whole(p_init, query, height, width), 3) | 1, height, width)


def _whole(p_init: float, query: int, height: int, width: int) -> int:
    halvings = sum(query > limit for limit in HALVINGS)
    return round(math.sqrt(p_init / 2**halvings * height * width))


def _window(words: Words, length: int, height: int, width: int) -> NDArray[np.bool_]:
    """(N, H, W): a square of this side at the place that two words say."""
    inside = []
    for word, size in zip(words.T, (height, width), strict=True):
        first, steps = place(word, size - length)[:, None], np.arange(size)[None]
        inside.append((steps >= first) & (steps < first + length))
    found: NDArray[np.bool_] = inside[0][:, :, None] & inside[1][:, None, :]
    return found


def _patterns(length: int, words: Words) -> Doubles:
    """The pattern for each image, upright or turned by the first word, with the sign of each channel by the others."""
    upright = eta(length)
    turned = np.where((words[:, 0] >> np.uint64(63)).astype(bool)[:, None, None], upright.T, upright)
    return turned[:, None] * signs(words[:, 1:])[:, :, None, None]


def _length(delta: Doubles) -> Doubles:
    """The l2 norm over the last two axes, which are kept."""
    flat = np.ascontiguousarray(delta * delta).reshape(*delta.shape[:2], -1)
    norm: Doubles = np.sqrt(flat.sum(axis=-1))[:, :, None, None]
    return norm


@lru_cache(maxsize=64)
def eta(length: int) -> Doubles:
    """The pattern of a window in l2: a heap above, a hollow below, of norm 1 together, (length, length)."""
    upper = length // 2
    pattern = np.concatenate([_heap(upper, length), -_heap(length - upper, length)])
    found: Doubles = pattern / np.sqrt((pattern**2).sum())
    return found


def _heap(height: int, width: int) -> Doubles:
    """Squares around the middle on each other, the k-th of side 2k - 1 and of height 1/k^2; of norm 1."""
    rows, columns = (np.abs(np.arange(size) - size // 2) for size in (height, width))
    ring = np.maximum(rows[:, None], columns[None])
    layers = 1.0 / np.arange(1, max(height // 2, width // 2) + 2) ** 2
    heap = np.cumsum(layers[::-1])[::-1][ring]
    found: Doubles = heap / np.sqrt((heap**2).sum()) if heap.size else heap
    return found
