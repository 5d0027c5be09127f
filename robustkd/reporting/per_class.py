"""Accuracies class by class: a mean can hide a class that broke in deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustkd.reporting.inputs import ReportInput
from robustkd.reporting.pictures import class_name
from robustkd.reporting.records import Answer

#: classes of a table; where there are more, those with the largest loss are shown
LIMIT = 50


@dataclass(frozen=True)
class ClassRow:
    """One class: how many images, and the shares right when clean and under attack; `lost` counts cell b."""

    name: str
    n: int
    clean: float
    robust: float
    source: float | None
    lost: int


def per_class(given: ReportInput) -> tuple[ClassRow, ...]:
    """A row for each class in the audit, in the order of the labels; empty where no answers were kept."""
    groups: dict[int, list[Answer]] = {}
    for answer in (given.predictions or {}).values():
        if answer.label is not None:
            groups.setdefault(answer.label, []).append(answer)
    rows = [_row(class_name(given, label), groups[label]) for label in sorted(groups)]
    if len(rows) <= LIMIT:
        return tuple(rows)
    return tuple(sorted(rows, key=lambda row: (-row.lost, row.robust))[:LIMIT])


def _row(name: str, answers: Sequence[Answer]) -> ClassRow:
    n, known = len(answers), all(a.source_robust is not None for a in answers)
    return ClassRow(
        name=name,
        n=n,
        clean=sum(a.clean == a.label for a in answers) / n,
        robust=sum(a.robust for a in answers) / n,
        source=sum(bool(a.source_robust) for a in answers) / n if known else None,
        lost=sum(bool(a.source_robust) and not a.robust for a in answers),
    )
