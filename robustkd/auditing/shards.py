"""Slices of an audit that several machines or processes share.

An audit's images are cut into chunks by their position, whatever survives of them; shard I of N attacks every N-th
chunk. A chunk's batch and random stream depend on its position alone, so shards merged in any order are the
unsharded audit to the last bit, also for attacks whose one stream serves a whole batch.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkd.errors import ConfigError


class Shard(NamedTuple):
    """Shard `number` of `total`, counted from 1."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8".

        Raises:
            ConfigError: it is not of that form, or there is no such shard.
        """
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"{text!r} is not a shard", where="--shard", fix="write --shard 1/4 up to --shard 4/4")
        return cls(int(found[1]), int(found[2]))

    def holds(self, chunk: int) -> bool:
        """Whether a chunk, counted from 0, is of this shard."""
        return chunk % self.total == self.number - 1

    def chunks(self, n: int, batch: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Number and positions of this shard's chunks of an audit of n images."""
        cuts = [np.arange(first, min(first + batch, n)) for first in range(0, n, batch)]
        return [(number, rows) for number, rows in enumerate(cuts) if self.holds(number)]

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


ALL = Shard(1, 1)
