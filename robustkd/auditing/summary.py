"""From records to the figures of the result."""

from __future__ import annotations

from robustkd.auditing.ledger import Flags, Ledger, Track
from robustkd.auditing.verdict import BLIND, Counts, Pair
from robustkd.result import AttackResult, Interval, Level
from robustkd.result import Side as SideResult
from robustkd.stats import wilson

#: the attacks whose images are 8-bit images: the images of all others, rounded, and the native one
EIGHT_BIT = ("uint8-post", "apgd-grid")


def counts_of(ledger: Ledger, *, white_box: bool, why: str = BLIND) -> Counts:
    """What the verdict reads; `white_box` says whether an attack with gradients ran, `why` what it means if none did."""
    engine, source = ledger.engine, ledger.source
    clean, robust = engine.clean.robust, engine.robust()
    n = len(clean)
    pairs: dict[str, Pair | None] = {"clean_pair": None, "robust_pair": None}
    if source is not None:
        pairs = {
            "clean_pair": _pair(source.clean.robust, clean),
            "robust_pair": _pair(source.robust(), robust),
        }
    return Counts(n, int(clean.sum()), int(robust.sum()), **pairs, white_box=white_box, why=why)


def _pair(source: Flags, engine: Flags) -> Pair:
    return Pair(int((source & ~engine).sum()), int((engine & ~source).sum()))


def yielded(track: Track, name: str, level: Level, calls: int, seconds: float, note: str = "") -> AttackResult:
    """What one attack did to one side, after those before it; images it was not tried on stand as they did."""
    n, left = len(track.clean.margin), int(track.robust().sum())
    low, high = wilson(left, n)
    tried = track.tried(name)
    return AttackResult(
        level=level,
        robust_accuracy=left / n,
        low=low,
        high=high,
        forward_calls=calls,
        seconds=seconds,
        images=int(tried.sum()),
        broken=int((tried & track.clean.robust & ~track.attacks[name].robust).sum()),
        note=note,
    )


def side_of(track: Track, attacks: dict[str, AttackResult]) -> SideResult:
    """One side of the result with Wilson intervals."""
    clean = track.clean.robust
    fine, grid = ([name for name in track.attacks if (name in EIGHT_BIT) is kind] for kind in (False, True))
    return SideResult(
        clean_accuracy=_interval(clean),
        robust_accuracy=_interval(track.robust()),
        robust_accuracy_float=_interval(clean & ~track.broken(fine)),
        robust_accuracy_uint8=_interval(clean & ~track.broken(grid)) if grid else None,
        attacks=attacks,
    )


def _interval(flags: Flags) -> Interval:
    k, n = int(flags.sum()), len(flags)
    low, high = wilson(k, n)
    return Interval(estimate=k / n, low=low, high=high)
