"""startup: a whole process of the command line, against an empty Typer program's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.timing import Row, interleave

ROOT = Path(__file__).parent.parent
EMPTY = str(Path(__file__).parent / "reference" / "empty.py")
CASES = {"help": (["--help"], ["--help"]), "list-methods": (["list", "methods"], ["nothing"])}


def rows(*, quick: bool) -> Iterator[Row]:
    for name, (ours, reference) in CASES.items():
        yield interleave(
            f"startup/{name}",
            lambda ours=ours: call(["-m", "robustkd", *ours]),
            lambda reference=reference: call([EMPTY, *reference]),
            pairs=5 if quick else 20,
        )


def call(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
