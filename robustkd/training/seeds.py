"""Randomness that does not remember: each draw is seeded by where it stands, so a resumed run continues exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator


def seed_of(*place: int) -> int:
    """A 63-bit seed for a place such as (seed, epoch, step, rank, purpose)."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*place: int, device: torch.device) -> Generator:
    """A generator for a place, on a device."""
    return Generator(device=device).manual_seed(seed_of(*place))
