"""How figures are written for people: percent with one decimal. Files keep the fractions."""

from __future__ import annotations

import math
from pathlib import PurePath

from robustkd.result import Interval
from robustkd.threat import ThreatModel


def tenths(fraction: float) -> str:
    """A fraction as percent with one decimal and no unit; never "-0.0", and "n/a" where it is not finite."""
    if not math.isfinite(fraction):
        return "n/a"
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text


def percent(fraction: float) -> str:
    """0.8125 -> "81.2 %"."""
    return f"{tenths(fraction)} %" if math.isfinite(fraction) else "n/a"


def points(fraction: float) -> str:
    """A difference of accuracies with its sign: 0.011 -> "+1.1"; a true minus sign for losses."""
    text = tenths(fraction)
    if text in ("0.0", "n/a"):
        return text
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


def interval(value: Interval) -> str:
    """An estimate with its limits: "81.2 % (79.4 to 82.9)"."""
    return f"{percent(value.estimate)} ({tenths(value.low)} to {tenths(value.high)})"


def eps(value: float) -> str:
    """A radius as people write it: "8/255" where it is exactly that, else the shortest decimal that reads back."""
    levels = round(value * 255)
    return f"{levels}/255" if levels and levels / 255 == value else repr(value)


def threat(model: ThreatModel) -> str:
    """The threat model in words: "L∞ 8/255"."""
    return f"{'L∞' if model.norm == 'linf' else 'L2'} {eps(model.eps)}"


def count(value: int) -> str:
    """An integer with thin groups: 120000 -> "120 000" (no-break spaces)."""
    return f"{value:,}".replace(",", "\u00a0")


def seconds(value: float) -> str:
    """A duration: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min"."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def milliseconds(value: float) -> str:
    """A latency with three digits: "0.412 ms", "12.3 ms", "1240 ms"."""
    return f"{value:#.3g} ms" if value < 100 else f"{value:.0f} ms"


def megabytes(size: int) -> str:
    """Bytes in units of a million: "8.94 MB", "0.031 MB"."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e6:.3f} MB"


def probability(value: float) -> str:
    """A p value: "0.146", or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def short(path: str) -> str:
    """The last two parts of a path, enough to tell artifacts apart: "cpu-int8/model.onnx"."""
    return "/".join(PurePath(path).parts[-2:])
