"""How long the engine takes on this machine: the latency gate, and a short measurement that every audit records."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import bdtr

from robustkd.auditing.verdict import Bound, Outcome, bound_check
from robustkd.bundle import hardware
from robustkd.engines._base import Engine, Images
from robustkd.recipe.policy import Gates
from robustkd.result import AuditResult, Interval, Latency, Timing
from robustkd.signals import check

CALLS, WARM, SHARE = 200, 20, 0.95
#: batch sizes that every audit times, seconds for each, and calls below which a percentile says nothing
BATCHES, SECONDS, LEAST = (1, 32), 0.5, 5


def latency_bounds(engine: Engine, x: Images, gates: Gates) -> list[Bound]:
    """The gate's bound, where a policy asks for one.

    Args:
        engine: as it was audited, with the threads of this process.
        x: images (n, C, H, W); as many as a batch holds are taken, again and again where there are fewer.
        gates: `latency_p95_ms` and `latency_batch`.
    """
    if gates.latency_p95_ms is None:
        return []
    return [judged(_times(engine, _batch(x, gates.latency_batch)), gates.latency_p95_ms, gates.latency_batch)]


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
    at = np.searchsorted(bdtr(np.arange(n), n, SHARE), (0.025, 0.975)).tolist()
    p95 = ordered[min(n - 1, int(np.ceil(SHARE * n)) - 1)]
    low, high = ordered[max(0, at[0] - 1)], ordered[min(n - 1, at[1])]
    outcome: Outcome = "ok" if high <= bound else "fail" if low > bound else "open"
    word = {"ok": "within", "fail": "more than", "open": "around"}[outcome]
    text = (
        f"latency of a batch of {batch} is {p95:.3g} ms at the 95th percentile ({low:.3g} to {high:.3g}), {word} {bound:g} ms"
    )
    seen = Interval(estimate=p95, low=low, high=high)
    return Bound(bound_check("gate: latency p95", outcome, seen, bound, text), outcome, text)


def with_speed(result: AuditResult, engine: Engine, x: Images, *, stochastic: bool = False) -> AuditResult:
    """The result with the size of its file and, where a call means something, the latency of its engine.

    Args:
        result: of a finished audit; its verdict does not change.
        engine: as it was audited, with the threads of this process.
        x: images (n, C, H, W).
        stochastic: the engine is asked many times for one answer, so that the time of a call is not that of an answer.
    """
    file = Path(result.artifact.path)
    size = file.stat().st_size if file.is_file() else None
    quick = None if stochastic or engine.info.runtime.startswith("fake") else latency(engine, x)
    return result.model_copy(update={"artifact": result.artifact.model_copy(update={"size": size}), "latency": quick})


def latency(engine: Engine, x: Images, *, clock: Callable[[], float] = time.perf_counter) -> Latency:
    """Time an engine for about a second, at one image and at as many of 32 as its largest batch holds.

    Args:
        engine: images in, logits out; transfers to a device are part of a call.
        x: images (n, C, H, W), taken again and again where there are fewer than a batch holds.
        clock: seconds, for tests.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    sizes = sorted({min(size, engine.info.max_batch or size) for size in BATCHES})
    return Latency(
        hardware=hardware(), load_average=load, timings=tuple(_timing(engine, _batch(x, size), clock) for size in sizes)
    )


def _batch(x: Images, size: int) -> Images:
    return np.ascontiguousarray(x[np.arange(size) % len(x)])


def _timing(engine: Engine, batch: Images, clock: Callable[[], float]) -> Timing:
    def call() -> float:
        check()
        begun = clock()
        engine.logits(batch)
        return clock() - begun

    warm = call()  # the first call of a batch size may allocate or compile
    for _ in range(min(WARM, int(SECONDS / 5 / max(warm, 1e-9)))):
        call()
    times: list[float] = []
    while len(times) < LEAST or (len(times) < CALLS and sum(times) < SECONDS):
        times.append(call())
    p50, p95, p99 = (1000 * float(value) for value in np.percentile(times, [50, 95, 99]))
    speed = len(batch) * len(times) / max(sum(times), 1e-9)
    return Timing(batch=len(batch), runs=len(times), p50=p50, p95=p95, p99=p99, images_per_second=speed)
