"""The tables of bench.methods, made from measured.json files alone: lines from runs, tables from lines."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench._methods_plan import CLEAN_TEACHER, ROBUST_TEACHER, YARDSTICK
from robustkd.stats import mcnemar_exact, wilson

Run = dict[str, Any]
MEASURES = ("clean", "pgd-20", "autoattack")


@dataclass(frozen=True)
class Paired:
    """The yardstick against a row under AutoAttack: same images, same seeds.

    Attributes:
        gap: the row's accuracy minus the yardstick's, as a fraction.
        b: pairs of image and seed on which the yardstick holds and the row is broken; c: the reverse.
        p: exact McNemar over these pairs.
        b_images: images on which the yardstick holds in more seeds; c_images: the reverse; p_images: exact sign test.
    """

    gap: float
    b: int
    c: int
    p: float
    b_images: int
    c_images: int
    p_images: float


@dataclass(frozen=True)
class Line:
    """One row over its seeds; accuracies are fractions per seed, in the order of `seeds`."""

    label: str
    seeds: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]
    n: dict[str, int]
    cost: dict[str, Any]
    seconds_per_step: float
    ratio: float | None
    paired: Paired | None
    note: str

    def mean(self, measure: str) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.accuracy[measure])


def lines(runs: list[Run]) -> list[Line]:
    """The runs with a seed, one line a label, the strongest under AutoAttack first."""
    by_label: dict[str, dict[int, Run]] = {}
    for run in runs:
        if "label" in run:
            by_label.setdefault(run["label"], {})[run["seed"]] = run
    found = [_line(label, seeds, by_label.get(YARDSTICK, {})) for label, seeds in by_label.items()]
    return sorted(found, key=lambda line: (-line.mean("autoattack"), line.label))


def _line(label: str, runs: dict[int, Run], yard: dict[int, Run]) -> Line:
    seeds = tuple(sorted(runs))
    common = [seed for seed in seeds if seed in yard]
    flags = {seed: {measure: as_flags(runs[seed]["flags"][measure]) for measure in MEASURES} for seed in seeds}
    ratios = [runs[seed]["seconds_per_step"] / yard[seed]["seconds_per_step"] for seed in common]
    return Line(
        label=label,
        seeds=seeds,
        accuracy={measure: tuple(float(flags[seed][measure].mean()) for seed in seeds) for measure in MEASURES},
        n={measure: len(flags[seeds[0]][measure]) for measure in MEASURES},
        cost=runs[seeds[0]]["cost"],
        seconds_per_step=statistics.median(runs[seed]["seconds_per_step"] for seed in seeds),
        ratio=statistics.median(ratios) if ratios else None,
        paired=_paired(runs, yard, common) if common and label != YARDSTICK else None,
        note=runs[seeds[0]]["note"],
    )


def as_flags(text: str) -> NDArray[np.int64]:
    """The text 0110 as numbers, (N,)."""
    return np.array([int(flag) for flag in text], dtype=np.int64)


def _paired(runs: dict[int, Run], yard: dict[int, Run], seeds: list[int]) -> Paired:
    """Over pairs of image and seed, and over images (the seeds of one image are not independent of each other)."""
    theirs = np.stack([as_flags(yard[seed]["flags"]["autoattack"]) for seed in seeds])
    ours = np.stack([as_flags(runs[seed]["flags"]["autoattack"]) for seed in seeds])
    b, c = int((theirs > ours).sum()), int((ours > theirs).sum())
    lead = theirs.sum(0) - ours.sum(0)
    b_images, c_images = int((lead > 0).sum()), int((lead < 0).sum())
    by_image = mcnemar_exact(b_images, c_images)
    return Paired((c - b) / ours.size, b, c, mcnemar_exact(b, c), b_images, c_images, by_image)


def with_interval(share: float, n: int) -> str:
    """Percent, with the Wilson interval of n images."""
    low, high = wilson(min(share * n, n), n)  # type: ignore[arg-type]  # a mean over seeds need not be a whole count
    return f"{share:.1%} ({low:.1%} to {high:.1%})".replace("%", "")


def table(found: list[Line]) -> str:
    """Accuracies in percent and the comparison with the yardstick, as Markdown."""
    head = ["method", "seeds", *MEASURES[:2], "AutoAttack", "over seeds", f"against {YARDSTICK}"]
    return markdown(
        [*head, "worse / better", "images worse / better"], [[*_accuracies(line), *_against(line)] for line in found]
    )


def costs(found: list[Line]) -> str:
    """What a training step costs, as Markdown, the cheapest first."""
    head = ["method", "passes per image", "ms per step", f"times {YARDSTICK}"]
    return markdown(head, [_costs(line) for line in sorted(found, key=lambda line: line.seconds_per_step)])


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def _accuracies(line: Line) -> list[str]:
    spread = line.accuracy["autoattack"]
    shown = [with_interval(line.mean(measure), line.n[measure]) for measure in MEASURES]
    return [line.label, str(len(line.seeds)), *shown, f"{100 * min(spread):.1f} to {100 * max(spread):.1f}"]


def _against(line: Line) -> list[str]:
    if (pair := line.paired) is None:
        return [""] * 3
    images = f"{pair.b_images} / {pair.c_images} ({_p(pair.p_images)})"
    return [f"{100 * pair.gap:+.1f}", f"{pair.b} / {pair.c} ({_p(pair.p)})", images]


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def _costs(line: Line) -> list[str]:
    passes = ", ".join([f"student {line.cost['student']}", *(f"{role} {n}" for role, n in line.cost["teachers"].items())])
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    return [line.label, passes, f"{1000 * line.seconds_per_step:.0f}", ratio]


def teachers(runs: list[Run]) -> str:
    """The teachers on the same images, as Markdown; empty where none was measured."""
    body = []
    for run in runs:
        if run["name"] in (CLEAN_TEACHER, ROBUST_TEACHER):
            flags = [as_flags(run["flags"][measure]) for measure in MEASURES]
            body.append([run["name"], *(with_interval(float(f.mean()), len(f)) for f in flags)])
    return markdown(["teacher", *MEASURES[:2], "AutoAttack"], body) if body else ""
