"""The one base exception of robustkd, its children and their exit codes (contract, section 2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class RobustKDError(Exception):
    """Something the user can mend: what is wrong, where, and how to mend it."""

    exit_code: ClassVar[int] = 1
    quiet: bool = False
    """Whether another process of the same run says it."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(RobustKDError):
    """A recipe, target profile or policy is wrong."""

    exit_code = 3


class RequirementError(RobustKDError):
    """A package, a GPU or a version is missing."""

    exit_code = 4


class ArtifactError(RobustKDError):
    """A file or folder is missing, damaged, foreign, of the wrong kind, in use or not writable."""

    exit_code = 5


class NumericsError(RobustKDError):
    """NaN, divergence, or parity broken between source and export."""

    exit_code = 6


class Interrupted(RobustKDError):
    """A stop was asked for by a signal; the state left behind can be resumed."""

    def __init__(self, signum: int, *, resume: str = "") -> None:
        super().__init__("interrupted", fix=f"resume with: {resume}" if resume else "")
        self.signum = signum


def nearest(name: str, valid: Iterable[str]) -> str:
    """A 'did you mean' sentence for a mistyped name, or the list of valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "valid: " + ", ".join(names)
