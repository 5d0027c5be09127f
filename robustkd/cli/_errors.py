"""From an exception to what the user sees: three lines and an exit code (contract, section 2)."""

from __future__ import annotations

import errno
import shlex
import traceback
from typing import Any

import typer

from robustkd.cli._extras import extra_of
from robustkd.errors import ArtifactError, Interrupted, RequirementError, RobustKDError

#: Typer's own complaints; its class moved between versions, its public child did not
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

#: commands with a --resume option
RESUMABLE = {"distill", "audit", "run"}

_MEND = {
    errno.ENOSPC: "free space on this disk, or choose another --output",
    errno.EDQUOT: "free space in your quota, or choose another --output",
    errno.EACCES: "ask for the right to use it, or choose another place",
    errno.EPERM: "ask for the right to use it, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EISDIR: "name a file, not a folder",
}


def explain(error: Exception) -> RobustKDError | None:
    """The three-line form of an exception, or None for a bug."""
    if isinstance(error, RobustKDError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return _from_os(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _from_import(error.name)
    return None


def _from_os(error: OSError) -> ArtifactError:
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return ArtifactError(
        error.strerror or type(error).__name__,
        where=where,
        fix=_MEND.get(error.errno or 0, "mend this and run the command again"),
    )


def _from_import(module: str) -> RequirementError | None:
    package = module.partition(".")[0]
    extra = extra_of(package)
    if extra is None:
        return None
    return RequirementError(f"this needs the package {package}, which is not installed", fix=extra.install)


def code_of(error: RobustKDError) -> int:
    """The exit code: the class's own, or 128 + the signal."""
    return 128 + error.signum if isinstance(error, Interrupted) else error.exit_code


def report(error: Exception, argv: list[str], *, debug: bool) -> int:
    """Print an exception to stderr; the exit code that goes with it. `argv` is the command line that failed."""
    if debug:
        _say("".join(traceback.format_exception(error)).rstrip())
    known = explain(error)
    if known is not None and getattr(error, "quiet", False):
        return code_of(known)
    if isinstance(known, Interrupted) and not known.fix:
        known = Interrupted(known.signum, resume=resume_command(argv))
    if known is not None:
        _say(str(known))
        return code_of(known)
    text = " ".join(str(error).split())
    _say(f"this is a bug in robustkd: {type(error).__name__}: {text}")
    if not debug:
        _say("  fix: run it again as `robustkd --debug ...` and report the traceback")
    return 1


def report_usage(error: Any) -> int:
    """Print a wrong command line in the same three lines; exit code 2."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "robustkd"
    _say(f"{error.format_message()}\n  at: {command}\n  fix: {command} --help")
    return int(error.exit_code)


def resume_command(argv: list[str]) -> str:
    """The command line that continues an interrupted one, or nothing where a command cannot be resumed."""
    if not RESUMABLE & set(argv):
        return ""
    return shlex.join(["robustkd", *argv, *([] if "--resume" in argv else ["--resume"])])


def _say(text: str) -> None:
    typer.echo(text, err=True)
