"""Several audits as candidates for one device: what each is worth, how fast and how large it is, in a table and a drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from robustkd.reporting.curves import COLOURS, canvas
from robustkd.result import AuditResult, Latency, Timing

#: inches of the drawing, and the room a label needs, as a share of the height of its axes
_SIZE, _LINE = (6.0, 3.4), 0.08


@dataclass(frozen=True)
class Target:
    """One row: `single` is the timing at batch 1, `largest` at the largest batch above it; None where not measured."""

    name: str
    result: AuditResult
    single: Timing | None
    largest: Timing | None


@dataclass(frozen=True)
class Picture:
    """Robust accuracy against `across`, markup that is safe to inline; `absent` names targets that it cannot show."""

    drawing: str
    across: str
    absent: tuple[str, ...]
    hollow: bool


def targets(results: Sequence[AuditResult]) -> list[Target]:
    """A row for each audit, in their order, under names that tell them apart."""
    rows = []
    for name, result in zip(_names([r.artifact.path for r in results]), results, strict=True):
        timings = sorted(result.latency.timings if result.latency else (), key=lambda timing: timing.batch)
        single = next((t for t in timings if t.batch == 1), None)
        largest = timings[-1] if timings and timings[-1].batch > 1 else None
        rows.append(Target(name, result, single, largest))
    return rows


def _names(paths: Sequence[str]) -> list[str]:
    """The folder where that is enough (`cpu-int8`), else as much of the ends of the paths as it takes."""
    parts = [PurePath(path).parts for path in paths]
    for first, last in ((-2, -1), (-2, None), (-3, None), (None, None)):
        names = ["/".join(part[first:last]) for part in parts]
        if len({name for name in names if name}) == len(paths):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths, 1)]


def machines(rows: Iterable[Target]) -> list[tuple[str, list[str]]]:
    """The machines that the latencies were measured on, each with the names of its targets."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.result.latency is not None:
            found.setdefault(_machine(row.result.latency, row.result.artifact.device), []).append(row.name)
    return list(found.items())


def _machine(latency: Latency, device: str) -> str:
    told = latency.hardware
    cores = f"{told['cores']} cores" if told.get("cores") else ""
    words = [device, told.get("cpu"), told.get("machine"), cores]
    return ", ".join(dict.fromkeys(str(word) for word in words if word))


def picture(rows: Sequence[Target], prefix: str) -> Picture | None:
    """Robust accuracy against latency; against size where not every target has a latency and more have a size.

    Raises:
        RequirementError: there is something to draw and matplotlib is missing.
    """
    fast = {row.name: row.single.p50 for row in rows if row.single is not None}
    small = {row.name: row.result.artifact.size / 1e6 for row in rows if row.result.artifact.size is not None}
    across, x = ("size of the file, MB", small) if len(small) > len(fast) else ("latency at batch 1, ms (median)", fast)
    shown = [row for row in rows if row.name in x]
    if not shown:
        return None
    absent = tuple(row.name for row in rows if row.name not in x)
    hollow = any(row.result.verdict.status == "invalid" for row in shown)
    return Picture(_draw(shown, [x[row.name] for row in shown], across, prefix), across.split(",")[0], absent, hollow)


def _draw(rows: Sequence[Target], x: Sequence[float], across: str, prefix: str) -> str:
    with canvas(f"{prefix}-targets", _SIZE) as (figure, drawn):
        axes = figure.subplots()
        for i, (row, at) in enumerate(zip(rows, x, strict=True)):
            seen, colour = row.result.engine.robust_accuracy, COLOURS[i % len(COLOURS)]
            axes.plot([at, at], [100 * seen.low, 100 * seen.high], color=colour, linewidth=2, alpha=0.5)
            fill = "none" if row.result.verdict.status == "invalid" else colour
            axes.plot([at], [100 * seen.estimate], color=colour, marker="o", markersize=7, markerfacecolor=fill)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.15, linewidth=1)
        axes.set(xlabel=across, ylabel="robust accuracy, %")
        axes.set_xlim(0, 1.15 * max(x) or 1)
        _label(axes, rows, x)
    return drawn[0]


def _label(axes: Any, rows: Sequence[Target], x: Sequence[float]) -> None:
    """Names beside their points, towards the middle, pushed up where two would lie on each other."""
    (low, high), middle, tall = axes.get_ylim(), axes.get_xlim()[1] / 2, 72 * 0.8 * _SIZE[1]
    last = {False: -1.0, True: -1.0}
    for row, at in sorted(zip(rows, x, strict=True), key=lambda pair: pair[0].result.engine.robust_accuracy.estimate):
        y, right = 100 * row.result.engine.robust_accuracy.estimate, at > middle
        own = (y - low) / (high - low)
        last[right] = max(own, last[right] + _LINE)
        axes.annotate(
            _plain(row.name),
            (at, y),
            xytext=(-9 if right else 9, tall * (last[right] - own)),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
        )


def _plain(name: str) -> str:
    """A name in letters that every font has, and short enough for a label."""
    text = "".join(letter if " " <= letter <= "~" else "?" for letter in name)
    return text if len(text) <= 32 else f"...{text[-29:]}"
