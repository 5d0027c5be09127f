"""Training curves as inline SVG: the same bytes for the same metrics, coloured by the page's style sheet."""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustkd.errors import RequirementError
from robustkd.reporting.numbers import percent

Line = dict[str, Any]
Series = dict[str, tuple[list[float], list[float]]]

#: keys of a step line that are no loss terms
_NOT_TERMS = frozenset({"step", "epoch", "lr", "loss", "images_per_s", "inner_share", "seconds"})
#: what a method balances by itself, in drawings of their own: the prefix of a column's name, what the axis is called
_GAUGES = {"w_": "loss weight", "tau_": "teacher temperature", "entropy_": "teacher entropy, nats"}
#: most points drawn per curve; longer runs are averaged in equal bins, which keeps the page light
_POINTS = 240
#: colours that matplotlib writes and the page's variables that take their place, so that a curve follows light and dark
_INK = "#0a0b0c"
COLOURS = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")


@dataclass(frozen=True)
class Gauge:
    """A drawing of quantities of one kind that a method adapts, and its name."""

    name: str
    drawing: str


@dataclass(frozen=True)
class Curves:
    """Drawings (markup that is safe to inline) and what they say in words; `gauges` only where the method has state."""

    loss: str
    accuracy: str
    caption: str
    gauges: tuple[Gauge, ...] = ()


def curves(metrics: Sequence[Line], *, prefix: str = "c") -> Curves | None:
    """Draw the loss with its terms, loss weights and temperatures over the steps, and the accuracies over the epochs.

    `prefix` keeps the ids of several drawings on one page apart.

    Raises:
        RequirementError: there is something to draw and matplotlib is missing.
    """
    steps = [line for line in metrics if "step" in line and _number(line.get("loss")) is not None]
    evaluations = [line for line in metrics if _number(line.get("clean_accuracy")) is not None]
    if not steps and not evaluations:
        return None
    loss = _draw(_losses(steps), "step", "loss", f"{prefix}-loss") if steps else ""
    accuracy = _draw(_accuracies(evaluations), "epoch", "accuracy, %", f"{prefix}-accuracy", top=100.0) if evaluations else ""
    return Curves(loss, accuracy, _caption(steps, evaluations), tuple(_gauges(steps, prefix)))


def _number(value: Any) -> float | None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None


def _losses(steps: Sequence[Line]) -> Series:
    series = {"loss": _series(steps, "step", lambda line: line.get("loss"))}
    for name in _terms(steps):
        series[name] = _series(steps, "step", lambda line, name=name: line.get(name))
    # a method with one term only repeats the loss
    return {name: s for name, s in list(series.items())[: len(COLOURS)] if name == "loss" or s[1] != series["loss"][1]}


def _terms(steps: Sequence[Line]) -> list[str]:
    names = [name for name, value in steps[0].items() if name not in _NOT_TERMS and _number(value) is not None]
    return [name for name in names if not name.startswith(tuple(_GAUGES))]


def _gauges(steps: Sequence[Line], prefix: str) -> Iterator[Gauge]:
    first = steps[0] if steps else {}
    for start, up in _GAUGES.items():
        names = [name for name, value in first.items() if name.startswith(start) and _number(value) is not None]
        series = {name: _series(steps, "step", lambda line, name=name: line.get(name)) for name in names[: len(COLOURS)]}
        if highest := max((value for _, y in series.values() for value in y), default=0.0):
            # hardly moving curves would lie on the upper edge
            yield Gauge(up, _draw(series, "step", up, f"{prefix}-{start.rstrip('_')}", top=1.1 * abs(highest)))


def _accuracies(evaluations: Sequence[Line]) -> Series:
    names = {"clean": "clean_accuracy", "robust": "robust_accuracy"}
    drawn = {name: _series(evaluations, "epoch", lambda line, key=key: line.get(key)) for name, key in names.items()}
    # the log counts epochs from 0, people from 1
    return {name: ([e + 1 for e in x], [100 * v for v in y]) for name, (x, y) in drawn.items() if y}


def _series(lines: Iterable[Line], across: str, pick: Any) -> tuple[list[float], list[float]]:
    pairs = [
        (x, y) for line in lines if (x := _number(line.get(across))) is not None and (y := _number(pick(line))) is not None
    ]
    if len(pairs) > _POINTS:
        pairs = [tuple(np.mean(part, axis=0).tolist()) for part in np.array_split(np.array(pairs), _POINTS)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _draw(series: Series, across: str, up: str, name: str, *, top: float | None = None) -> str:
    with canvas(name, (5.2, 3.0)) as (figure, drawn):
        axes = figure.subplots()
        for colour, (label, (x, y)) in zip(COLOURS, series.items(), strict=False):
            few = len(x) <= 40
            axes.plot(x, y, color=colour, linewidth=2, marker="o" if few else "", markersize=3.5, label=label.lstrip("_"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.15, linewidth=1)
        axes.set(xlabel=across, ylabel=up)
        axes.set_ylim(bottom=0, top=top)
        if len(found := {v for x, _ in series.values() for v in x}) == 1:
            axes.set_xlim(min(found) - 1, max(found) + 1)  # one epoch: whole numbers on the axis all the same
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, loc="best")
    return drawn[0]


@contextmanager
def canvas(name: str, size: tuple[float, float]) -> Iterator[tuple[Any, list[str]]]:
    """A matplotlib figure of so many inches to draw on, and a list that holds its markup for a page afterwards.

    Raises:
        RequirementError: matplotlib is missing.
    """
    figure_module = _matplotlib("matplotlib.figure")
    _matplotlib("matplotlib.backends.backend_svg")
    rc = _matplotlib("matplotlib").rc_context
    settings = {
        "svg.hashsalt": f"robustkd-{name}",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _INK,
        "path.simplify": False,
        "text.parse_math": False,  # a loss term may be called anything
    }
    with rc(settings):
        figure, drawn = figure_module.Figure(figsize=size, layout="constrained"), list[str]()
        yield figure, drawn
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    drawn.append(_inline(stream.getvalue(), name))


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequirementError(
            "curves need matplotlib, which is not installed", fix="pip install 'robustkd[report]'"
        ) from error


def _inline(svg: str, name: str) -> str:
    """Make a stand-alone SVG part of a page: no addresses, no global style, ids of its own, colours from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for i, colour in enumerate(COLOURS, 1):
        svg = svg.replace(colour, f"var(--line-{i})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return svg.replace(_INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _caption(steps: Sequence[Line], evaluations: Sequence[Line]) -> str:
    words = [_evaluated(evaluations[-1])] if evaluations else []
    speeds = [v for line in steps if (v := _number(line.get("images_per_s"))) is not None]
    shares = [v for line in steps if (v := _number(line.get("inner_share"))) is not None]
    if speeds:
        words.append(f"Median speed {np.median(speeds):,.0f} images per second.".replace(",", "\u00a0"))
    if shares:
        words.append(f"{100 * float(np.mean(shares)):.0f} % of the time went into the inner problem.")
    return " ".join(words)


def _evaluated(last: Line) -> str:
    clean, robust, epoch = (_number(last.get(key)) for key in ("clean_accuracy", "robust_accuracy", "epoch"))
    when = "" if epoch is None else f" (epoch {epoch + 1:.0f})"
    found = [f"{name} {percent(value)}" for name, value in (("clean", clean), ("robust", robust)) if value is not None]
    return f"At its last evaluation{when} the trainer measured {' and '.join(found)} accuracy."
