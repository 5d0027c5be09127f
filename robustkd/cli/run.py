"""`robustkd run`: the whole chain, from a recipe to a verdict and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustkd.cli._print import Json, emit, processes, say
from robustkd.cli.distill import Data, NoVerify, Output, RecipeName, Settings, Threads, TrustPickle, collect

if TYPE_CHECKING:
    from robustkd.api import Run


def run(
    recipe: RecipeName,
    settings: Settings = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this recipe.")] = False,
    data: Data = None,
    threads: Threads = None,
    no_verify_teacher: NoVerify = False,
    trust_pickle: TrustPickle = False,
    json: Json = False,
) -> None:
    """Distill, export every target of the recipe, audit each exported file, write the report.

    The exit code is that of the worst verdict: 0 pass, 10 fail, 11 inconclusive, 12 invalid.
    """
    from robustkd import api
    from robustkd.cli._progress import Training
    from robustkd.errors import ConfigError
    from robustkd.result import EXIT

    if processes()[1] > 1:
        raise ConfigError(
            "the chain runs in one process; only its training is shared among several",
            where="WORLD_SIZE",
            fix="launch `robustkd distill` over the processes, then export and audit its checkpoint",
        )
    resolved = api.load_recipe(recipe, collect(settings, data, threads, no_verify_teacher))
    folder = output or api.run_folder(resolved.name, resume=resume)
    api.warn_eps(resolved.threat.eps, say)
    say(f"writing to {folder}")
    with Training(f"{resolved.method.name} {resolved.student.name}") as progress:
        made = api.run(resolved, folder, resume=resume, trust_pickle=trust_pickle, listen=progress)
    emit(_summary(made)) if json else _print(made)
    raise typer.Exit(EXIT[made.verdict])


def _summary(made: Run) -> dict[str, Any]:
    targets = {
        name: {
            "bundle": str(path.parent),
            "audit": str(path),
            "verdict": result.verdict.status,
            "clean_accuracy": result.engine.clean_accuracy.estimate,
            "robust_accuracy": result.engine.robust_accuracy.estimate,
        }
        for name, (result, path) in made.audits.items()
    }
    return {
        "run": str(made.folder),
        "checkpoint": str(made.checkpoint.path),
        "targets": targets,
        "report": str(made.report),
        "seconds": made.seconds,
    }


def _print(made: Run) -> None:
    from robustkd.reporting.markdown import summary

    for name, (result, _) in made.audits.items():
        typer.echo(f"\n# {name}\n\n{summary(result)}")
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in made.seconds.items())
    typer.echo(f"report: {made.report}\n{seconds}")
