"""Drawings of an audit: who survives which radius, and the loss around some images."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from robustkd.reporting.curves import COLOURS, canvas
from robustkd.result import EpsCurve, Landscape, RadiusCurve


def eps_plot(curve: EpsCurve | None, radius: RadiusCurve | None, norm: str, prefix: str) -> str:
    """The ladder of S6, and the one that is monotone for every image, as markup for a page; empty where there is none.

    Raises:
        RequirementError: matplotlib is missing.
    """
    if curve is None:
        return ""
    levels = norm == "linf" and max(curve.eps) <= 1
    with canvas(f"{prefix}-eps", (5.2, 3.0)) as (figure, drawn):
        axes = figure.subplots()
        drawings = [("independent runs", curve)] + ([("warm-started", radius)] if radius is not None else [])
        for colour, style, (label, line) in zip(COLOURS, (("o", "--"), ("s", "-")), drawings, strict=False):
            x, y = [255 * eps if levels else eps for eps in line.eps], [100 * part for part in line.survive]
            axes.plot(x, y, color=colour, linewidth=2, marker=style[0], linestyle=style[1], markersize=4, label=label)
        if radius is not None:
            axes.legend(frameon=False, loc="best")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.15, linewidth=1)
        axes.set(xlabel="eps, in 1/255" if levels else "eps", ylabel="images that survive, %")
        axes.set_ylim(0, 105)
        axes.set_xlim(left=0)
    return drawn[0]


def landscape_plot(seen: Landscape | None, prefix: str) -> str:
    """The loss around each image as a heat map of its own; empty where there is none.

    Raises:
        RequirementError: matplotlib is missing.
    """
    if seen is None:
        return ""
    n, half = len(seen.images), float(max(seen.along))
    with canvas(f"{prefix}-landscape", (2.1 * n + 0.6, 2.6)) as (figure, drawn):
        panels = np.atleast_1d(figure.subplots(1, n, sharey=True))
        for axes, image, loss in zip(panels, seen.images, seen.loss, strict=True):
            grid = np.array([[np.nan if value is None else value for value in row] for row in loss], np.float64)
            extent = (-half, half, -half, half)
            axes.imshow(grid, origin="lower", extent=extent, cmap="viridis", interpolation="none", aspect="equal")
            axes.plot([0], [0], marker="+", color="white", markersize=7)
            axes.set_xticks([-half, 0, half], ["−", "0", "+"])
            axes.set_yticks([-half, 0, half], ["−", "0", "+"])
            axes.set_title(f"image {image}", fontsize=10)
        panels[0].set_ylabel("along the gradient")
        panels[n // 2].set_xlabel(f"along random signs; the axes end at {_radius(half)}")
    return drawn[0]


def _radius(value: float) -> str:
    """A radius as people write it: 8/255, or a decimal."""
    found = Fraction(value * 255).limit_denominator(1000)
    return f"{found.numerator}/255" if found.denominator == 1 and value < 1 else f"{value:g}"
