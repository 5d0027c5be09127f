"""Printing: stdout carries the product, stderr the progress; rich is imported only where something is drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def processes() -> tuple[int, int]:
    """(rank, world) as a launcher such as torchrun or `accelerate launch` told this process; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def emit(value: Any) -> None:
    """One JSON object on stdout, for machines."""
    typer.echo(json.dumps(value, indent=1, default=str))


def say(text: str) -> None:
    """A line on stderr, for people."""
    typer.echo(text, err=True)


def console(*, err: bool = False) -> Console:
    """A rich console that is plain when piped and under NO_COLOR."""
    from rich.console import Console

    return Console(stderr=err, soft_wrap=True, highlight=False)


def columns(rows: Iterable[Sequence[object]]) -> None:
    """Rows on stdout in aligned columns; the last column is free. Plain text, so that grep and cut work."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    for row in cells:
        head = (cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True))
        typer.echo("  ".join([*head, row[-1]]).rstrip())
