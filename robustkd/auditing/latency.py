"""The latency gate: how long the engine takes for a batch, as the 95th percentile of many calls on this machine."""

from __future__ import annotations

import time

import numpy as np
from scipy.stats import binom

from robustkd.auditing.verdict import Bound, Outcome, bound_check
from robustkd.engines._base import Engine, Images
from robustkd.recipe.policy import Gates
from robustkd.result import Interval
from robustkd.signals import check

CALLS, WARM, SHARE = 200, 20, 0.95


def latency_bounds(engine: Engine, x: Images, gates: Gates) -> list[Bound]:
    """The gate's bound, where a policy asks for one.

    Args:
        engine: as it was audited, with the threads of this process.
        x: images (n, C, H, W); as many as a batch holds are taken, again and again where there are fewer.
        gates: `latency_p95_ms` and `latency_batch`.
    """
    if gates.latency_p95_ms is None:
        return []
    batch = np.ascontiguousarray(x[np.arange(gates.latency_batch) % len(x)])
    return [judged(_times(engine, batch), gates.latency_p95_ms, gates.latency_batch)]


def _times(engine: Engine, batch: Images) -> list[float]:
    """Milliseconds of each call, after some that are not counted."""
    found = []
    for call in range(WARM + CALLS):
        check()
        begun = time.perf_counter()
        engine.logits(batch)
        if call >= WARM:
            found.append(1000 * (time.perf_counter() - begun))
    return found


def judged(times: list[float], bound: float, batch: int) -> Bound:
    """Hold the percentile against the bound; its 95 % interval is that of order statistics, whatever the distribution."""
    ordered, n = sorted(times), len(times)
    at = [int(binom.ppf(q, n, SHARE)) for q in (0.025, 0.975)]
    p95 = ordered[min(n - 1, int(np.ceil(SHARE * n)) - 1)]
    low, high = ordered[max(0, at[0] - 1)], ordered[min(n - 1, at[1])]
    outcome: Outcome = "ok" if high <= bound else "fail" if low > bound else "open"
    word = {"ok": "within", "fail": "more than", "open": "around"}[outcome]
    text = (
        f"latency of a batch of {batch} is {p95:.3g} ms at the 95th percentile ({low:.3g} to {high:.3g}), {word} {bound:g} ms"
    )
    seen = Interval(estimate=p95, low=low, high=high)
    return Bound(bound_check("gate: latency p95", outcome, seen, bound, text), outcome, text)
