"""Slices of an audit that several machines or processes share.

An audit's images are cut into chunks by their position, whatever survives of them; shard I of N attacks every N-th
chunk. A chunk's batch and random stream depend on its position alone, so shards merged in any order are the
unsharded audit to the last bit, also for attacks whose one stream serves a whole batch.
"""

from __future__ import annotations

import re
from typing import NamedTuple

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

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


ALL = Shard(1, 1)
