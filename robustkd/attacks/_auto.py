"""What the entries made from the authors' AutoAttack (PyPI: pyautoattack) share."""

from __future__ import annotations

from typing import Any

from robustkd.errors import RequirementError

#: the package names norms so
NORMS = {"linf": "Linf", "l2": "L2"}


def autoattack(module: str) -> Any:
    """A module of pyautoattack.

    Raises:
        RequirementError: the package is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"pyautoattack.{module}")
    except ImportError as error:
        raise RequirementError(
            "this attack needs the package pyautoattack", where=str(error), fix="pip install 'robustkd[train]'"
        ) from error
