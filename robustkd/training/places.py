"""Where weights are looked for. Needs no torch, so that they can be listed without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def folders(root: Path | None) -> Iterator[Path]:
    """Where weights are looked for, and in the first of which fetched ones are put.

    Args:
        root: the data root; left out, ROBUSTKD_DATA, then ./data.
    """
    if given := os.environ.get("ROBUSTKD_TEACHERS"):
        yield Path(given).expanduser()
    yield (root or Path(os.environ.get("ROBUSTKD_DATA", "data"))).expanduser() / "teachers"


def here(file: str, root: Path | None, *, shipped: Path) -> Path | None:
    """A card's file, beside the card or under a folder of teachers; a .safetensors of the same name also does."""
    if (shipped / file).is_file():
        return shipped / file
    for folder in folders(root):
        for found in (folder / file, (folder / file).with_suffix(".safetensors")):
            if found.is_file():
                return found
    return None
