"""The learning rate as a function of the fraction of epochs done; evaluated per step, so nothing needs saving."""

from __future__ import annotations

import math

from robustkd.recipe.schema import Schedule


def rate(schedule: Schedule, lr: float, *, epoch: float, epochs: int) -> float:
    """The learning rate at a fractional epoch in [0, epochs).

    `step` multiplies by gamma from each milestone on (0-based epochs); `cosine` falls to 0; `onecycle` rises over
    `warmup` epochs (0.3 of all where none is given) and falls linearly to 0; `constant` stays.
    """
    warmup = schedule.warmup
    if schedule.name == "onecycle":
        rise = warmup or 0.3 * epochs
        return lr * (epoch / rise if epoch < rise else max(0.0, (epochs - epoch) / max(epochs - rise, 1e-9)))
    scale = min(1.0, epoch / warmup) if warmup else 1.0
    if schedule.name == "cosine":
        return lr * scale * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule.name == "step":
        return lr * scale * schedule.gamma ** sum(math.floor(epoch) >= m for m in schedule.milestones)
    return lr * scale
