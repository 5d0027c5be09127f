"""Interleaved timing: ours, reference, ours, reference, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def interleave(
    case: str,
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    pairs: int,
    warm: int = 1,
    settle: Callable[[], object] = lambda: None,
    ready: tuple[Callable[[], object], Callable[[], object]] = (lambda: None, lambda: None),
) -> Row:
    """Time both in turns.

    Args:
        case: what is timed.
        ours: one sample of ours.
        reference: one sample of the reference.
        pairs: how many samples of each.
        warm: how many untimed samples of each come first.
        settle: waits until a GPU has done what a sample asked of it.
        ready: what is done before each sample of ours and of the reference, untimed.

    Returns:
        Medians in seconds, `ratio` = reference / ours (above 1: ours is faster), and the range over all samples;
        `ratio_range` is over the pairs.
    """
    for _ in range(warm):
        ours()
        reference()
    settle()
    times = [(_seconds(ours, settle, ready[0]), _seconds(reference, settle, ready[1])) for _ in range(pairs)]
    return row(case, times)


def row(case: str, times: list[tuple[float, float]], *, unit: str = "s") -> Row:
    """The row of a case from its pairs (ours, reference), less being better."""
    mine, theirs = [a for a, _ in times], [b for _, b in times]
    a, b = statistics.median(mine), statistics.median(theirs)
    ratios = [theirs / mine for mine, theirs in times]
    return {
        "case": case,
        "ratio": b / a,
        "ours": a,
        "reference": b,
        "unit": unit,
        "pairs": len(times),
        "ratio_range": [min(ratios), max(ratios)],
        "ours_range": [min(mine), max(mine)],
        "reference_range": [min(theirs), max(theirs)],
    }


def _seconds(sample: Callable[[], object], settle: Callable[[], object], ready: Callable[[], object]) -> float:
    ready()
    settle()
    began = time.perf_counter()
    sample()
    settle()
    return time.perf_counter() - began
