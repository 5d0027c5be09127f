"""`robustkd distill`: a recipe becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustkd.cli._print import Json, emit, processes, say

RecipeName = Annotated[str, typer.Option("--recipe", "-r", metavar="R", help="A shipped recipe, or a path to your own YAML.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="K=V", help="Override one value of the recipe, e.g. train.epochs=2; may be repeated."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The run's folder; left out, a new one under ./runs.")]
Data = Annotated[Path | None, typer.Option("--data", help="Data root; left out, ROBUSTKD_DATA, then ./data.")]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify-teacher", help="Do not measure the teacher after loading; it is then taken as it is."),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Let a weight file run the code it brings, where its sha256 is on the teacher's card or in the recipe.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; left out, the idle cores.")]


def collect(settings: list[str] | None, data: Path | None, threads: int | None, no_verify: bool) -> list[str]:
    """The options that are short for a --set, in that form."""
    import json

    extra = [f"dataset.root={json.dumps(str(data))}"] if data is not None else []
    extra += [f"train.threads={threads}"] if threads is not None else []
    return [*(settings or []), *extra, *(["train.verify_teacher=false"] if no_verify else [])]


def distill(
    recipe: RecipeName,
    settings: Settings = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run of this recipe.")] = False,
    data: Data = None,
    threads: Threads = None,
    no_verify_teacher: NoVerify = False,
    trust_pickle: TrustPickle = False,
    json: Json = False,
) -> None:
    """Train a student by the recipe's method and write a checkpoint bundle."""
    from robustkd import api
    from robustkd.cli._progress import Training

    resolved = api.load_recipe(recipe, collect(settings, data, threads, no_verify_teacher))
    folder = output or api.run_folder(resolved.name, resume=resume)
    main = processes()[0] == 0  # the others work, and leave the talking to it
    if main:
        api.warn_eps(resolved.threat.eps, say)
        say(f"writing to {folder}")
    with Training(f"{resolved.method.name} {resolved.student.name}") as progress:
        made = api.distill(resolved, folder, resume=resume, trust_pickle=trust_pickle, listen=progress)
    if not main:
        return
    facts = made.manifest.model_dump()
    if json:
        emit({"checkpoint": str(made.path), "selected": facts["selected"], "seconds": facts["training"]["seconds"]})
        return
    best, last = facts["selected"]["best"], facts["selected"]["last"]
    typer.echo(f"checkpoint: {made.path}")
    for name, found in (("best", best), ("last", last)):
        if found:
            clean, robust = found["clean"], found["robust"]
            typer.echo(f"{name}: held-out clean {clean:.1%}, PGD-10 {robust:.1%} (epoch {found['epoch'] + 1})")
    typer.echo(f"next: robustkd export {made.path}")
