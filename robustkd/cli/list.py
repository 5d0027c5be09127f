"""`robustkd list`: what there is, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from robustkd.cli._print import Json, columns, emit, say


def list(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="methods, recipes, targets, teachers, students, datasets, attacks, engines or policies.",
        ),
    ],
    json: Json = False,
) -> None:
    """List methods, recipes, targets, teachers, students, data sets, attacks or engines."""
    from robustkd.cli._stock import stock

    rows = stock(kind)
    if json:
        emit({kind: rows})
        return
    if kind == "methods":
        _methods(rows)
        return
    if kind == "teachers":
        from robustkd.cli._teachers import table

        columns(table(rows))
        return
    if kind == "targets":
        _targets(rows)
        return
    columns((row["name"], row["summary"]) for row in rows)
    if not rows:
        say(f"no {kind} in this installation")


def _targets(rows: Sequence[dict[str, Any]]) -> None:
    """What can be built and run here, and at the end why the rest cannot."""
    yes = {"cannot_build": ("not built here", "built here"), "cannot_run": ("not run here", "runs here")}
    columns((row["name"], *(words[not row[key]] for key, words in yes.items()), row["summary"]) for row in rows)
    for row in rows:
        for why in dict.fromkeys(filter(None, (row["cannot_build"], row["cannot_run"]))):
            say(f"{row['name']}: {why}")


def _methods(rows: Sequence[dict[str, Any]]) -> None:
    from robustkd.cli._stock import UNIT, cost_text, teachers_of, through_of

    head = ("method", "teachers", "gradient through teacher", "relative cost", "paper")
    columns([head, *((row["name"], teachers_of(row), through_of(row), cost_text(row), row["paper"]) for row in rows)])
    say(f"relative cost: {UNIT}")
