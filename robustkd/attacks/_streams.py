"""Random numbers that belong to an image: batch, order and shard cannot change what it meets."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]


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
        return torch.from_numpy(signs(self.words(query, n)).astype(np.float32))


def signs(words: Words) -> NDArray[np.float64]:
    """A sign for each word."""
    return np.where(words >> np.uint64(63), 1.0, -1.0)


def shares(words: Words) -> NDArray[np.float64]:
    """A number uniform in [0, 1) for each word."""
    found: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) / 2.0**53
    return found


def place(word: Words, last: int) -> NDArray[np.int64]:
    """A position in 0..last - 1 (0 where there is but one), as the authors of Square draw it."""
    first: NDArray[np.int64] = np.floor(shares(word) * last).astype(np.int64)
    return first


def _mix(word: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Words = word ^ (word >> np.uint64(31))
    return mixed
