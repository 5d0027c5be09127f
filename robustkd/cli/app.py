"""The `robustkd` command: global options, commands on demand, and errors as three lines and an exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.main import get_command

from robustkd import __version__
from robustkd.cli import _errors
from robustkd.cli._lazy import COMMANDS, LazyGroup, placeholder


@dataclass
class Globals:
    """What the global options said."""

    debug: bool = False


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"robustkd {__version__}")
        raise typer.Exit


def _entry(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; give it before the command.")] = False,
) -> None:
    """Distil adversarially robust image classifiers, export them, and audit the exported file itself."""
    context.find_object(Globals).debug = debug  # type: ignore[union-attr]  # main() always gives one
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def build() -> typer.Typer:
    """The application with a placeholder for every command."""
    app = typer.Typer(
        name="robustkd",
        cls=LazyGroup,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(_entry)
    for name, summary in COMMANDS.items():
        app.command(name, help=summary)(placeholder)
    return app


def run(argv: list[str]) -> int:
    """Run one command line (without the program's name); its exit code. Prints, never raises an Exception."""
    options = Globals()
    try:
        outcome = get_command(build()).main(argv, prog_name="robustkd", standalone_mode=False, obj=options)
    except _errors.UsageError as error:
        return _errors.report_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:  # the one place where everything ends: a sentence instead of a traceback
        return _errors.report(error, argv, debug=options.debug)
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """Entry point of the `robustkd` script."""
    sys.exit(run(sys.argv[1:]))
