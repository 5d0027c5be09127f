"""The verbs: the only place that sees a whole recipe and joins the stages."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from robustkd.auditing.artifact import Shape, Subject
from robustkd.auditing.facts import ArtifactFacts
from robustkd.auditing.fresh import Reopen
from robustkd.auditing.verb import audit as _audit
from robustkd.auditing.verb import audit_shard as _audit_shard
from robustkd.bundle import MANIFEST, Bundle
from robustkd.engines._base import Engine
from robustkd.engines._open import open_engine as load_engine
from robustkd.engines.pytorch import PytorchEngine, chosen, without_tf32
from robustkd.exporting.verb import export, resolve
from robustkd.recipe.reading import override, read, validate
from robustkd.recipe.schema import Recipe, TeacherConfig
from robustkd.reporting.html import write_report as report
from robustkd.result import AuditResult, Status
from robustkd.signals import check, graceful
from robustkd.training.loop import Listen
from robustkd.training.teachers import check_teachers, load_teachers, read_card
from robustkd.training.verb import WORK
from robustkd.training.verb import distill as _distill

__all__ = [
    "audit",
    "audit_shard",
    "distill",
    "export",
    "load_engine",
    "load_recipe",
    "open_teacher",
    "report",
    "run",
    "run_folder",
    "runs_folder",
    "warn_eps",
]

V = TypeVar("V", bound=Callable[..., Any])
TEACHER = "teacher:"

#: from the best to the worst verdict; a run is as good as its worst target
ORDER: tuple[Status, ...] = ("pass", "inconclusive", "invalid", "fail")


@dataclass(frozen=True)
class Run:
    """What `run` made: the checkpoint, each target's audit, and the seconds each stage took."""

    folder: Path
    checkpoint: Bundle
    audits: dict[str, tuple[AuditResult, Path]]
    report: Path
    seconds: dict[str, float]

    @property
    def verdict(self) -> Status:
        """The worst verdict over all targets."""
        return max((result.verdict.status for result, _ in self.audits.values()), key=ORDER.index)


def warn_eps(eps: float, say: Callable[[str], None]) -> None:
    """Say so where a radius looks like one on the 0..255 scale: images are in [0, 1]."""
    if eps > 0.5:
        say(f"warning: eps {eps:g} is more than half of the image range [0, 1]; did you mean {eps:g}/255?")


def load_recipe(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by shipped name or path, with `key=value` settings applied last.

    Raises:
        ConfigError: the file, a key or a value is wrong, or a teacher does not suit the data.
    """
    source = override(read("recipe", str(name)), settings)
    recipe = validate(Recipe, source)
    check_teachers(recipe, source.where)
    return recipe


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


def distill(
    recipe: Recipe,
    output: Path | str | None = None,
    *,
    resume: bool = False,
    trust_pickle: bool = False,
    listen: Listen = lambda event: None,
) -> Bundle:
    """Train the recipe's student; see `robustkd.training.verb.distill`.

    Args:
        recipe: the resolved recipe.
        output: the run's folder; left out, a new one below the runs folder.
        resume: continue an interrupted run.
        trust_pickle: let a file run code when it is read, where its digest is on the teacher's card or in the recipe.
        listen: called with an event for each step and evaluation.
    """
    folder = Path(output) if output else run_folder(recipe.name, resume=resume)
    return _distill(recipe, folder, resume=resume, trust_pickle=trust_pickle, listen=listen)


def open_teacher(
    name: str,
    root: Path | None = None,
    *,
    device: str = "cpu",
    trust_pickle: bool = False,
    listen: Listen = lambda event: None,
) -> Subject:
    """The network of a teacher card, as an audit takes it: with the card's data set and threat model, and no source.

    Args:
        name: of the card.
        root: the data root, whose `teachers` may hold the weights; left out, ROBUSTKD_DATA, then ./data.
        device: where it runs: `cpu`, `cuda`, or `auto`.
        trust_pickle: let a file run code when it is read, where its digest is on the card.
        listen: called with the events of a download.

    Raises:
        ConfigError: no teacher has this name.
        ArtifactError: its weights are missing, or are not those described.
    """
    card = read_card(name)
    wanted = TeacherConfig(id=name)
    nets, origins = load_teachers(
        (wanted,),
        channels=card.channels,
        classes=card.classes,
        device=chosen(device),
        root=root,
        trust_pickle=trust_pickle,
        listen=listen,
    )
    net = nets[wanted.role]

    def engine(shape: Shape) -> PytorchEngine:
        return PytorchEngine(net, input_shape=(card.channels, *shape[1:]), classes=card.classes)

    facts = ArtifactFacts(f"{TEACHER}{name}", origins[0]["sha256"])
    home = runs_folder() / f"teacher-{name}" / "audit"
    again = Reopen("robustkd.api:reopen_teacher", json.dumps([name, str(root) if root else None, trust_pickle, device]))
    return Subject(facts, engine, home, net=net, recipe={"dataset": card.dataset}, threat=card.threat, reopen=again)


def reopen_teacher(told: str, shape: Shape) -> Engine:
    """The engine of a teacher, in a fresh process: its name, the data root, whether its file may run code, its device."""
    name, root, trusted, device = json.loads(told)
    without_tf32()
    return open_teacher(name, Path(root) if root else None, device=device, trust_pickle=trusted).engine(shape)


def _knowing_teachers(verb: V) -> V:
    """The verb, which then also takes `teacher:NAME`: auditing and teachers are stages that meet only here."""

    @wraps(verb)
    def knowing(artifact: Path | str | Subject, **options: Any) -> Any:
        if isinstance(artifact, str) and artifact.startswith(TEACHER):
            name, device = artifact.removeprefix(TEACHER), options.get("device", "cpu")
            artifact = open_teacher(name, options.get("data_root"), device=device)
        return verb(artifact, **options)

    return cast(V, knowing)


audit = _knowing_teachers(_audit)
audit_shard = _knowing_teachers(_audit_shard)


def run(
    recipe: Recipe,
    output: Path | str | None = None,
    *,
    resume: bool = False,
    trust_pickle: bool = False,
    listen: Listen = lambda event: None,
) -> Run:
    """The whole chain: distill, export every target of the recipe, audit each, report.

    Whatever a stopped run has finished is kept: `resume` goes on with the first stage that is not.

    Args:
        recipe: the resolved recipe.
        output: the run's folder; left out, a new one below the runs folder.
        resume: continue an interrupted run.
        trust_pickle: let a file run code when it is read, where its digest is on the teacher's card or in the recipe.
        listen: called with the events of training, and with an event for each stage.
    """
    resolve(recipe.targets)
    folder = Path(output) if output else run_folder(recipe.name, resume=resume)
    clock = _Clock()
    with graceful():
        checkpoint = distill(recipe, folder, resume=resume, trust_pickle=trust_pickle, listen=listen)
        clock.lap("distill")
        bundles = {name: _exported(name, checkpoint, folder, listen) for name in recipe.targets}
        clock.lap("export")
        check()
        audits = {name: _audited(name, bundle, recipe, resume, listen) for name, bundle in bundles.items()}
        clock.lap("audit")
        page = report([path for _, path in audits.values()], folder / "report.html")
    return Run(folder, checkpoint, audits, page, clock.laps | {"total": clock.total()})


def _exported(name: str, checkpoint: Bundle, folder: Path, listen: Listen) -> Bundle:
    if (folder / name / MANIFEST).is_file() and Bundle.open(folder / name).manifest.parent == checkpoint.digest:
        return Bundle.open(folder / name)
    listen({"event": "stage", "message": f"export {name}"})
    return export(checkpoint.path, targets=[name], output=folder)[0]


def _audited(name: str, bundle: Bundle, recipe: Recipe, resume: bool, listen: Listen) -> tuple[AuditResult, Path]:
    listen({"event": "stage", "message": f"audit {name}"})

    def progress(message: str) -> None:
        listen({"event": "audit", "message": message})

    return audit(bundle.path, seed=recipe.seed, resume=resume, progress=progress)


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 1), now

    def total(self) -> float:
        return round(time.monotonic() - self.began, 1)
