"""From counts to an answer. A check compares an interval with a bound: wholly inside passes, wholly outside
fails, straddling is inconclusive, and then says how many images would decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robustkd.recipe.policy import AuditConfig, Gates, gates_of
from robustkd.result import Check, CheckStatus, Difference, Interval, Status, Verdict
from robustkd.stats import clopper_pearson, mcnemar_exact, needed_n, needed_n_single, tango, wilson

Outcome = Literal["ok", "fail", "open"]

#: a blocking check of these kinds voids the evidence itself: even a fail would not be proved
VOIDS = ("S15",)

_STATUS: dict[Outcome, CheckStatus] = {"ok": "ok", "fail": "block", "open": "warn"}


#: why nothing is shown where no attack with gradients ran
BLIND = "only attacks without gradients ran; they can refute robustness, not show it: give a source"


@dataclass(frozen=True)
class Pair:
    """Discordant images: b where only the source is right, c where only the engine is."""

    b: int
    c: int


@dataclass(frozen=True)
class Counts:
    """What the verdict reads: images, right answers of the engine, and the paired tables if there is a source.

    `white_box` says whether an attack with gradients ran: without one, robustness can be refuted, not shown; `why` says so.
    """

    n: int
    clean: int
    robust: int
    clean_pair: Pair | None = None
    robust_pair: Pair | None = None
    white_box: bool = True
    why: str = BLIND


@dataclass(frozen=True)
class Bound:
    """A check against a bound, its outcome, and the sentence for the verdict."""

    check: Check
    outcome: Outcome
    reason: str


def difference(counts: Counts) -> Difference | None:
    """Source minus engine with Tango's one-sided 95 % limits, or None without a source."""
    clean, robust = counts.clean_pair, counts.robust_pair
    if clean is None or robust is None:
        return None
    return Difference(
        clean=_drop(clean, counts.n),
        robust=_drop(robust, counts.n),
        mcnemar_p=mcnemar_exact(robust.b, robust.c),
        b=robust.b,
        c=robust.c,
        clean_b=clean.b,
        clean_c=clean.c,
    )


def _drop(pair: Pair, n: int) -> Interval:
    low, high = tango(pair.b, pair.c, n)
    return Interval(estimate=(pair.b - pair.c) / n, low=low, high=high)


def judge(
    counts: Counts, asked: AuditConfig | Gates, checks: Sequence[Check], measured: Sequence[Bound] = ()
) -> tuple[tuple[Check, ...], Verdict]:
    """The verdict and all checks, those of the bounds last; `measured` are bounds that are no accuracy.

    Fail where a bound is broken beyond doubt, even if a sanity check blocks: the worst case found is real. Else
    invalid where a check blocks; else pass where every bound is met beyond doubt; else inconclusive.
    """
    accuracies = _bounds(counts, asked if isinstance(asked, Gates) else gates_of(Gates(), asked))
    bounds = [*accuracies, *measured]
    blocks = [check for check in checks if check.status == "block"]
    void = [check for check in blocks if check.name.startswith(VOIDS)]
    outcomes = {bound.outcome for bound in bounds}
    named = tuple(f"{check.name}: {check.message}" for check in blocks)
    status: Status
    reasons: tuple[str, ...]
    if "fail" in outcomes and not void:
        status, reasons = "fail", (*_reasons(bounds, "fail"), *named)
    elif blocks:
        status, reasons = "invalid", named
    elif not accuracies and outcomes <= {"ok"}:
        reason = "there is nothing to hold the engine against: give a source, --min-robust or --min-clean"
        status, reasons = "inconclusive", (reason,)
    elif outcomes == {"ok"}:
        status, reasons = "pass", _reasons(bounds, "ok")
    else:
        status, reasons = "inconclusive", _reasons(bounds, "open")
    return (*checks, *(bound.check for bound in bounds)), Verdict(status=status, reasons=reasons)


def _reasons(bounds: Sequence[Bound], outcome: Outcome) -> tuple[str, ...]:
    return tuple(bound.reason for bound in bounds if bound.outcome == outcome)


def _bounds(counts: Counts, gates: Gates) -> list[Bound]:
    found = []
    drops = (("clean", counts.clean_pair, gates.clean_drop), ("robust", counts.robust_pair, gates.robust_drop))
    for what, pair, points in drops:
        if pair is not None and points is not None:
            tolerance = points / 100
            found.append(_drop_bound(what, pair, counts.n, tolerance, unshown=_unshown(counts, what)))
    if gates.min_clean is not None:
        found.append(_floor("clean", counts.clean, counts.n, gates.min_clean / 100))
    if gates.min_robust is not None:
        found.append(_floor("robust", counts.robust, counts.n, gates.min_robust / 100, unshown=_unshown(counts, "robust")))
    return found


def _unshown(counts: Counts, what: str) -> str:
    """Why a bound that seems met is not shown to be; empty where it is."""
    return counts.why if what == "robust" and not counts.white_box else ""


def _drop_bound(what: str, pair: Pair, n: int, tolerance: float, *, unshown: str = "") -> Bound:
    drop, outcome = _drop(pair, n), _outcome(pair, n, tolerance)
    limits = f"one-sided 95 % limits {100 * drop.low:.2f} and {100 * drop.high:.2f}"
    seen = f"{what} accuracy drops by {_points(drop.estimate)} ({limits})"
    reason = {
        "ok": f"{seen}, within {_points(tolerance)}",
        "fail": f"{seen}, more than {_points(tolerance)}",
        "open": f"{seen}; {_points(tolerance)} are allowed: {_decide_drop(pair, n, tolerance)}",
    }[outcome]
    if outcome == "ok" and unshown:
        outcome, reason = "open", f"{seen}, but {unshown}"
    return Bound(bound_check(f"bound: {what} drop", outcome, drop, tolerance, reason), outcome, reason)


def _outcome(pair: Pair, n: int, tolerance: float) -> Outcome:
    """Tango's limits against the tolerance, and the exact binomial limits as well where only one side ever held.

    There the score test errs up to 6.8 % instead of 5 % (268 images, no disagreement, tolerance 1 point).
    """
    low, high = tango(pair.b, pair.c, n)
    if not pair.c:
        least, most = clopper_pearson(pair.b, n, alpha=0.1)
        low, high = min(low, least), max(high, most)
    return "ok" if high <= tolerance else "fail" if low > tolerance else "open"


def _decide_drop(pair: Pair, n: int, tolerance: float) -> str:
    drop, discordance = (pair.b - pair.c) / n, (pair.b + pair.c) / n
    wanted = needed_n(discordance, drop, tolerance, fail=drop > tolerance)
    if wanted is None:
        return "no number of images decides a drop that lies on the bound"
    wanted = max(wanted, n + 1)
    while not _decides(pair, n, wanted, tolerance):  # the formula is short where few images disagree
        wanted = math.ceil(1.05 * wanted)
    return f"about {wanted} images would probably decide, this audit has {n}"


def _decides(pair: Pair, n: int, wanted: int, tolerance: float) -> bool:
    """Whether the same shares of so many images would lie on one side of the tolerance."""
    same = Pair(round(pair.b * wanted / n), round(pair.c * wanted / n))
    return wanted > 10**8 or _outcome(same, wanted, tolerance) != "open"


def _floor(what: str, k: int, n: int, floor: float, *, unshown: str = "") -> Bound:
    low, high = wilson(k, n)
    interval = Interval(estimate=k / n, low=low, high=high)
    outcome: Outcome = "ok" if low > floor else "fail" if high < floor else "open"
    seen = f"{what} accuracy is {_percent(k / n)} ({_percent(low)} to {_percent(high)})"
    if outcome == "ok" and unshown:
        outcome, reason = "open", f"{seen}, but {unshown}"
    elif outcome == "open":
        wanted = needed_n_single(k / n, floor)
        more = "no number of images decides" if wanted is None else f"about {max(wanted, n + 1)} images would decide"
        reason = f"{seen}, around the floor of {_percent(floor)}: {more}, this audit has {n}"
    else:
        side = "above" if outcome == "ok" else "below"
        reason = f"{seen}, {side} the floor of {_percent(floor)}"
    return Bound(bound_check(f"bound: min {what}", outcome, interval, floor, reason), outcome, reason)


def bound_check(name: str, outcome: Outcome, seen: Interval, bound: float, message: str) -> Check:
    """A bound as a check."""
    return Check(
        name=name,
        status=_STATUS[outcome],
        observed=seen.estimate,
        low=seen.low,
        high=seen.high,
        bound=bound,
        message=message,
    )


def _points(value: float) -> str:
    return f"{100 * value:.2f} points"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
