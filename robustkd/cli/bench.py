"""`robustkd bench`: latency and throughput of artifacts on this machine, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustkd.cli._print import Json, columns, emit, say


def bench(
    artifacts: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACT...", help="Bundle folders or bare files; speed-ups are against the first."),
    ],
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Batch sizes.")] = "1,32",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of each artifact.")] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="About how long to measure each artifact at each batch size.")
    ] = 2.0,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs that are not counted.")] = 10,
    trust_engine: Annotated[
        bool, typer.Option("--trust-engine", help="Load a TensorRT engine that no manifest vouches for.")
    ] = False,
    json: Json = False,
) -> None:
    """Time artifacts in turns: p50, p95 and p99 of the latency, images per second, and the ratio to the first."""
    sizes = _sizes(batch)

    from robustkd.benchmarking.verb import bench as run

    told = run(artifacts, batches=sizes, threads=threads, seconds=seconds, warmup=warmup, trust=trust_engine, say=say)
    emit(told) if json else _print(told)


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of batch sizes such as 1,32", param_hint="--batch")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _print(told: dict[str, Any]) -> None:
    several = len(told["artifacts"]) > 1
    head = [
        "batch",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "images/s",
        "MB",
        "runtime",
        *(["speed-up", "of best", "of CPU time"] if several else []),
        "artifact",
    ]
    rows = [_row(made, timing) for made in told["artifacts"] for timing in made["timings"]]
    columns([head, *sorted(rows, key=lambda row: int(row[0]))])
    machine, first = told["machine"], told["artifacts"][0]
    threads = first["settings"].get("threads")
    say(f"{machine['cpu']}, {machine['cores']} cores" + (f", {threads} thread(s)" if threads else "") + "; wall-clock time")


def _row(made: dict[str, Any], timing: dict[str, Any]) -> list[str]:
    latency, speedup = timing["latency_ms"], timing["speedup"]
    return [
        str(timing["batch"]),
        *(f"{latency[key]:.3g}" for key in ("p50", "p95", "p99")),
        f"{timing['images_per_second']:.0f}",
        f"{made['bytes'] / 1e6:.2f}",
        f"{made['runtime']} {made['precision']}",
        *([f"{speedup['estimate']:.2f}x", f"{speedup['best']:.2f}x", _cpu(speedup["cpu"])] if speedup else []),
        made["artifact"],
    ]


def _cpu(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
