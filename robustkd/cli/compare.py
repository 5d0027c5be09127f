"""`robustkd compare`: audit results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustkd.cli._print import Json, emit


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT...", help="Audit bundles, run folders (every audit in them) or result.json files."),
    ],
    json: Json = False,
) -> None:
    """Put audit results side by side, and say where they were not made alike."""
    from robustkd import reporting

    found = [reporting.read(path).result for path in reporting.find(results)]
    if json:
        emit({"results": reporting.compare(found), "mismatches": reporting.mismatches(found)})
    else:
        typer.echo(reporting.table(found), nl=False)
