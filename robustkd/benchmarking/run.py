"""Latency and throughput of engines, measured in turns so that a machine that slows down slows all of them.

Wall-clock time of `engine.logits` on a batch of random images, after a warm-up. A speed-up is the median over the rounds
of (time of the first engine / time of this one) within one round. Each turn of several engines begins with a run that is
not counted: threads of the engine before go on spinning for a while, and hold the cores that the next one is to have.
Measured on two cores, int8 right after fp32 was no faster than it; alone, or after such a run, twice as fast.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from robustkd.engines._base import Engine

LEAST, MOST = 20, 5000
"""Rounds: enough for a percentile to mean something, and an end for very small networks."""


class Latency(BaseModel, frozen=True):
    """Milliseconds for one batch."""

    p50: float
    p95: float
    p99: float
    mean: float
    min: float


class Speedup(BaseModel, frozen=True):
    """How many times as fast as the first artifact; above 1 is faster."""

    estimate: float = Field(description="median over the rounds")
    low: float = Field(description="first quartile")
    high: float = Field(description="third quartile")
    best: float = Field(description="ratio of the shortest times: what remains of it on a busy machine")
    cpu: float | None = Field(
        None, description="ratio of the medians of CPU time, all threads together; none where not all run on the CPU"
    )


class Timing(BaseModel, frozen=True):
    """One artifact at one batch size."""

    batch: int
    runs: int
    warmup: int
    latency_ms: Latency
    cpu_ms: float = Field(description="median CPU time of the process for one batch, all threads together")
    images_per_second: float
    speedup: Speedup | None = Field(None, description="against the first artifact; none where there is only one")


def measure(
    engines: Mapping[str, Engine],
    batch: int,
    *,
    seconds: float = 2.0,
    warmup: int = 10,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every engine at one batch size, in turns.

    Args:
        engines: by name; the first is what the others are compared with.
        batch: images at once.
        seconds: about how long to run each engine, after the warm-up.
        warmup: runs of each that are not counted.
        clock: seconds, for tests.
        cpu_clock: seconds of CPU time of this process, for tests.
        pause: called between two rounds; may raise to stop.
    """
    images = {name: _images(engine, batch) for name, engine in engines.items()}
    for name, engine in engines.items():
        for _ in range(warmup):
            engine.logits(images[name])
    times: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    begun = clock()
    while _wanted(next(iter(times.values())), clock() - begun, seconds * len(engines)):
        pause()
        for name, engine in engines.items():
            if len(engines) > 1:
                engine.logits(images[name])
            start, spent = clock(), cpu_clock()
            engine.logits(images[name])
            cpu[name].append(cpu_clock() - spent)
            times[name].append(clock() - start)
    on_cpu = all(engine.info.device == "cpu" for engine in engines.values())
    return _timings(times, cpu, on_cpu, batch, warmup)


def _wanted(done: Sequence[float], spent: float, budget: float) -> bool:
    return len(done) < LEAST or (spent < budget and len(done) < MOST)


def _images(engine: Engine, batch: int) -> Any:
    return np.random.default_rng(0).random((batch, *engine.info.input_shape), dtype=np.float32)


def _timings(
    times: Mapping[str, list[float]], cpu: Mapping[str, list[float]], on_cpu: bool, batch: int, warmup: int
) -> dict[str, Timing]:
    arrays = {name: np.asarray(values) for name, values in times.items()}
    spent = {name: float(np.median(values)) for name, values in cpu.items()}
    first = next(iter(arrays))
    return {
        name: Timing(
            batch=batch,
            runs=len(taken),
            warmup=warmup,
            latency_ms=_latency(1e3 * taken),
            cpu_ms=1e3 * spent[name],
            images_per_second=float(batch * len(taken) / taken.sum()),
            speedup=_speedup(arrays[first], taken, spent[first] / spent[name] if on_cpu and spent[name] else None)
            if len(arrays) > 1
            else None,
        )
        for name, taken in arrays.items()
    }


def _latency(ms: Any) -> Latency:
    p50, p95, p99 = (float(v) for v in np.percentile(ms, [50, 95, 99]))
    return Latency(p50=p50, p95=p95, p99=p99, mean=float(ms.mean()), min=float(ms.min()))


def _speedup(first: Any, taken: Any, cpu: float | None) -> Speedup:
    low, middle, high = (float(v) for v in np.percentile(first / taken, [25, 50, 75]))
    return Speedup(estimate=middle, low=low, high=high, best=float(first.min() / taken.min()), cpu=cpu)


def load() -> dict[str, Any]:
    """How busy the machine is: other work makes every figure worse, and single ones by chance."""
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"load_average": average, "cores": os.cpu_count()}
