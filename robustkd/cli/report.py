"""`robustkd report`: one self-contained HTML page from audit results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustkd.cli._print import say


def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT...", help="Audit bundles, run folders (every audit in them) or result.json files."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")],
) -> None:
    """Write one self-contained HTML page from audit results: no network, no script, fit for print."""
    from robustkd.reporting import write_report

    page = write_report(results, output)
    say(f"wrote {page} ({page.stat().st_size / 1024:.0f} KiB), open it in any browser")
