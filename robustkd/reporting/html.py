"""One self-contained page: no network, no script, everything escaped, readable on paper and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robustkd import __version__
from robustkd.bundle import write_atomic
from robustkd.errors import ArtifactError, RequirementError
from robustkd.reporting import markdown, numbers
from robustkd.reporting.compare import mismatches
from robustkd.reporting.curves import Curves, curves
from robustkd.reporting.inputs import ReportInput, find, read
from robustkd.reporting.per_class import ClassRow, per_class
from robustkd.reporting.pictures import Gallery, gallery
from robustkd.reporting.plots import eps_plot, landscape_plot
from robustkd.reporting.targets import machines, picture, targets
from robustkd.result import AuditResult, Check

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
_GRAVITY = {"block": 0, "warn": 1, "ok": 2, "skipped": 3}


@dataclass(frozen=True)
class Section:
    """One audit, ready for the template."""

    anchor: str
    given: ReportInput
    result: AuditResult
    gallery: Gallery | None
    lost: Gallery | None
    classes: tuple[ClassRow, ...]
    curves: Curves | None
    curves_at: str
    eps_curve: str
    landscape: str
    checks: tuple[Check, ...]
    settings: tuple[tuple[str, str], ...]


def write_report(paths: Iterable[Path | str], output: Path | str) -> Path:
    """Read audits (bundles, run folders or result.json files) and write one page; returns `output`.

    Raises:
        ArtifactError: one is missing or damaged, or the page cannot be written.
        RequirementError: jinja2 or matplotlib is missing.
    """
    output = Path(output)
    page = render([read(path) for path in find(map(Path, paths))])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"cannot write here: {error.strerror}", where=str(output.parent), fix="choose another --output"
        ) from error
    write_atomic(output, page.encode("utf-8", "xmlcharrefreplace"))
    return output


def render(results: Sequence[ReportInput]) -> str:
    """The page for these results, in their order; the same inputs give the same text.

    Raises:
        RequirementError: jinja2 is missing, or matplotlib where there are curves to draw.
    """
    values = [given.result for given in results]
    rows = targets(values) if len(values) > 1 else []
    page: str = _template().render(
        sections=_sections(results),
        targets=rows,
        pareto=picture(rows, "all"),
        machines=machines(rows),
        notes=mismatches(values) if values else [],
        tally=_tally(values),
        version=__version__,
    )
    return page.lstrip()


def _sections(results: Sequence[ReportInput]) -> list[Section]:
    """Targets of one run share a training: its curves are drawn once, and later sections point there."""
    sections: list[Section] = []
    for number, given in enumerate(results, 1):
        twin = next((s for s in sections if s.curves and s.given.metrics == given.metrics), None)
        sections.append(
            Section(
                anchor=f"audit-{number}",
                given=given,
                result=given.result,
                gallery=gallery(given),
                lost=gallery(given, lost=True),
                classes=per_class(given),
                curves=None if twin else curves(given.metrics, prefix=f"a{number}"),
                curves_at=twin.anchor if twin else "",
                eps_curve=eps_plot(given.result.eps_curve, given.result.radius_curve, given.result.threat.norm, f"a{number}"),
                landscape=landscape_plot(given.result.landscape, f"a{number}"),
                checks=tuple(sorted(given.result.checks, key=lambda check: _GRAVITY[check.status])),
                settings=_settings(given.result),
            )
        )
    return sections


def _settings(result: AuditResult) -> tuple[tuple[str, str], ...]:
    policy = {**result.policy, **(result.policy.get("bounds") or {})}
    return tuple((k.replace("_", " "), _text(v)) for k, v in policy.items() if k != "bounds" and v is not None)


def _text(value: Any) -> str:
    """A setting as text: words as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _tally(results: Sequence[AuditResult]) -> str:
    """How many audits have which verdict: "2 pass, 1 fail"."""
    statuses = [r.verdict.status for r in results]
    return ", ".join(f"{statuses.count(s)} {s}" for s in markdown.VERDICTS if s in statuses)


def _share(value: float) -> str:
    """A position on a track from 0 to 100 %, cut to it."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"


def _span(low: float, high: float) -> str:
    """The length of an interval on that track."""
    return _share(min(high, 1.0) - max(low, 0.0))


@cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise RequirementError(
            "the report needs jinja2, which is not installed", fix="pip install 'robustkd[report]'"
        ) from error
    world = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    world.filters |= {
        "percent": numbers.percent,
        "tenths": numbers.tenths,
        "points": numbers.points,
        "count": numbers.count,
        "seconds": numbers.seconds,
        "milliseconds": numbers.milliseconds,
        "megabytes": numbers.megabytes,
        "probability": numbers.probability,
        "threat": numbers.threat,
        "short": numbers.short,
        "share": _share,
        "span": _span,
        "facts": markdown.facts,
        "command": markdown.command,
        "text": _text,
    }
    world.globals |= {"verdicts": markdown.VERDICTS, "levels": markdown.LEVELS}
    return world.get_template(TEMPLATE.name)
