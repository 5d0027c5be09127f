"""What is imported only when asked for: shelves, which are folders of one-file entries found by name, and other packages.

An entry is a module that defines `ENTRY`; `b_mtard.py` is `b-mtard`. Third parties add entries through an
entry point of the group `robustkd.<shelf>`.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from robustkd.errors import ConfigError, RequirementError, nearest


def needed(module: str, what: str, *, fix: str) -> Any:
    """A module of another package.

    Args:
        module: its full name.
        what: what it is for, the first half of the message.
        fix: how to come by it.

    Raises:
        RequirementError: it does not import.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision made for another torch fails with RuntimeError
        raise RequirementError(f"{what}, which does not import here", where=str(error), fix=fix) from error


class Shelf:
    """The entries of one shelf, for example `Shelf("methods")`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._folder = Path(__file__).parent / name

    def _shipped(self) -> list[str]:
        files = self._folder.glob("*.py")
        return sorted(f.stem.replace("_", "-") for f in files if not f.stem.startswith("_"))

    def _foreign(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in metadata.entry_points(group=f"robustkd.{self.name}")}

    def names(self) -> list[str]:
        """The names of all entries, without importing one."""
        return sorted({*self._shipped(), *self._foreign()})

    def get(self, name: str) -> Any:
        """The `ENTRY` of one file.

        Raises:
            ConfigError: no entry has this name.
        """
        if name in self._shipped():
            module = importlib.import_module(f"robustkd.{self.name}.{name.replace('-', '_')}")
            return module.ENTRY
        if name in (foreign := self._foreign()):
            return foreign[name].load()
        raise ConfigError(f"{name} is not on the shelf of {self.name}", fix=nearest(name, self.names()))
