"""A Typer group whose commands are imported only when chosen, so that `robustkd --help` stays quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

#: every command and its one line of help, in the order of the chain; the rest of its help is in its own file
COMMANDS = {
    "run": "The whole chain: distill, export every target, audit each, report.",
    "distill": "Train a robust student from a recipe.",
    "export": "Turn a checkpoint into a deployable file and check its parity.",
    "audit": "Attack an exported file itself and give a verdict.",
    "report": "Write one self-contained HTML page from audit results.",
    "compare": "Put audit results side by side.",
    "bench": "Time artifacts side by side: latency and throughput.",
    "list": "List methods, recipes, targets, teachers, students, data sets, attacks or engines.",
    "show": "Show a recipe, target, teacher or method in full.",
    "copy": "Copy a recipe or target profile out, to edit it.",
    "inspect": "Say what a file or bundle is and what it holds.",
    "verify": "Check the digests of a bundle and its chain of parents.",
    "doctor": "Say what this machine has, what is missing and how to get it.",
}


def load(name: str) -> Any:
    """The full command of a name; imports `robustkd.cli.<name>` and nothing else of robustkd."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"robustkd.cli.{name}"), name)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, no_args_is_help=False)(function)
    return get_command(app)


class LazyGroup(TyperGroup):
    """Holds a placeholder per command for `--help`, and swaps the real one in when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the chosen command before Typer looks it up."""
        if args and args[0] in self.commands:
            self.add_command(load(args[0]), args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run; a reader that closed the pipe (`robustkd list | head`) is no error."""
        try:
            outcome = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # the interpreter flushes stdout once more at exit: give it somewhere to write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        return outcome


def placeholder() -> None:
    """Stands for a command that is not imported yet."""
