"""`robustkd list`: what there is, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from robustkd.cli._print import Json, columns, emit, say


def list(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="methods, recipes, targets, teachers, students, datasets, attacks or engines.",
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
    columns((row["name"], row["summary"]) for row in rows)
    if not rows:
        say(f"no {kind} in this installation")
