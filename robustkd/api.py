"""The verbs: the only place that sees a whole recipe and joins the stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from robustkd.bundle import Bundle
from robustkd.recipe.reading import override, read, validate
from robustkd.recipe.schema import Recipe
from robustkd.training.loop import Listen
from robustkd.training.verb import WORK
from robustkd.training.verb import distill as _distill


def warn_eps(eps: float, say: Callable[[str], None]) -> None:
    """Say so where a radius looks like one on the 0..255 scale: images are in [0, 1]."""
    if eps > 0.5:
        say(f"warning: eps {eps:g} is more than half of the image range [0, 1]; did you mean {eps:g}/255?")


def load_recipe(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with `key=value` settings applied last.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    return validate(Recipe, override(read("recipe", str(name)), settings))


def runs_folder() -> Path:
    """Where runs go: ROBUSTKD_RUNS, or ./runs."""
    return Path(os.environ.get("ROBUSTKD_RUNS", "runs")).expanduser()


def run_folder(name: str, *, resume: bool = False) -> Path:
    """The folder of a run that was given none: the newest unfinished one to resume, otherwise a new one.

    A finished or unfinished run is never touched: the next free `name-2`, `name-3` is taken.
    """
    runs = runs_folder()
    if resume:
        unfinished = [f.parent for f in runs.glob(f"{name}*/{WORK}") if not (f.parent / "checkpoint").exists()]
        if unfinished:
            return max(unfinished, key=lambda folder: (folder / WORK).stat().st_mtime)
        return runs / name
    folder, number = runs / name, 1
    while (folder / WORK).exists() or (folder / "checkpoint").exists():
        number += 1
        folder = runs / f"{name}-{number}"
    return folder


def distill(recipe: Recipe, output: Path | None = None, *, resume: bool = False, listen: Listen = lambda event: None) -> Bundle:
    """Train the recipe's student; see `robustkd.training.verb.distill`.

    Args:
        recipe: the resolved recipe.
        output: the run's folder; left out, a new one below the runs folder.
        resume: continue an interrupted run.
        listen: called with an event for each step and evaluation.
    """
    return _distill(recipe, output or run_folder(recipe.name, resume=resume), resume=resume, listen=listen)
