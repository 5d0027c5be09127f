"""The installed TensorRT libraries: which are here, which versions are known to work, and what they log.

Classic TensorRT is `tensorrt`, TensorRT-RTX is `tensorrt_rtx`; what this package calls exists in 10.3 to 11.x and RTX 1.x.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from robustkd.engines._plan import PlanKind
from robustkd.errors import RequirementError


class Family(NamedTuple):
    """One of the two TensorRTs."""

    title: str
    runtime: str
    module: str
    oldest: tuple[int, int]
    below: tuple[int, int]
    packages: tuple[str, ...]
    install: str


FAMILIES: dict[PlanKind, Family] = {
    "trt": Family(
        "TensorRT",
        "tensorrt",
        "tensorrt",
        (10, 3),
        (12, 0),
        ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
        "on a Jetson install JetPack 6, which brings it; elsewhere pip install 'robustkd[trt]'",
    ),
    "rtx": Family(
        "TensorRT-RTX",
        "tensorrt-rtx",
        "tensorrt_rtx",
        (1, 5),
        (2, 0),
        ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx"),
        "pip install 'robustkd[rtx]'",
    ),
}


def numbers(version: str) -> tuple[int, ...]:
    """The numbers a version begins with: 10.13.3.9 -> (10, 13, 3, 9)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def installed(kind: PlanKind) -> bool:
    """Whether the package is here; it is not imported."""
    name = FAMILIES[kind].module
    return name in sys.modules or find_spec(name) is not None


def installed_version(kind: PlanKind) -> str | None:
    """The version of the package that is here, from its metadata; None where it is not here or brought none."""
    if installed(kind):
        for package in FAMILIES[kind].packages:
            with suppress(metadata.PackageNotFoundError):
                return metadata.version(package)
    return None


def library(kind: PlanKind) -> ModuleType:
    """The imported module.

    Raises:
        RequirementError: it is missing, does not import, or its version is not one that works.
    """
    family = FAMILIES[kind]
    try:
        module = import_module(family.module)
    except (ImportError, OSError) as error:  # OSError: a library of its own is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequirementError(f"{family.title} is not installed here", where=reason, fix=family.install) from error
    check_version(kind, str(getattr(module, "__version__", "")))
    return module


def check_version(kind: PlanKind, version: str) -> None:
    """Refuse versions that do not work.

    Raises:
        RequirementError: it is older or newer than what is supported.
    """
    family, found = FAMILIES[kind], numbers(version)[:2]
    if not family.oldest <= found < family.below:
        oldest, below = (".".join(map(str, pair)) for pair in (family.oldest, family.below))
        raise RequirementError(
            f"{family.title} {version or 'of unknown version'} is not supported",
            where=f"package {family.module}",
            fix=f"install {family.title} {oldest} or newer, below {below}",
        )


class Log(NamedTuple):
    """The one logger of a process: `handle` for the library, `lines` of (severity, text)."""

    handle: Any
    lines: list[tuple[str, str]]

    def errors(self) -> list[str]:
        """What was logged as an error, in order."""
        return [text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]

    def warnings(self) -> list[str]:
        """What was logged as a warning, in order."""
        return [text for severity, text in self.lines if severity == "WARNING"]

    def text(self) -> str:
        """Everything but the most talkative lines."""
        return "".join(f"{severity}: {text}\n" for severity, text in self.lines if severity != "VERBOSE")


_LOGS: dict[int, Log] = {}


def log_of(trt: Any) -> Log:
    """The logger of a library, emptied. Only the first one that is handed to a library counts, so there is only one."""
    if id(trt) not in _LOGS:
        lines: list[tuple[str, str]] = []

        class Collecting(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                lines.append((severity.name, str(message)))

        _LOGS[id(trt)] = Log(Collecting(), lines)
    log = _LOGS[id(trt)]
    log.lines.clear()
    return log
