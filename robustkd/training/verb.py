"""distill(): a recipe becomes a checkpoint bundle, in a folder that one run at a time may use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from robustkd import bundle as bundles
from robustkd import signals
from robustkd.bundle import Bundle, ModelInfo, write_json
from robustkd.datasets._base import ImageSet
from robustkd.errors import ArtifactError, ConfigError
from robustkd.models._files import portable
from robustkd.recipe.schema import Recipe
from robustkd.training import threads
from robustkd.training.batches import divide
from robustkd.training.loop import Listen, Loop
from robustkd.training.start import read_start
from robustkd.training.teachers import load_teachers
from robustkd.training.team import Team, join
from robustkd.training.verify_teacher import Verifier

WORK = ".training"
"""The folder inside a run that holds its resumable state until the checkpoint is written."""
_NO_MATTER = {"train.threads", "train.verify_teacher"}
"""What of a recipe may differ when a run is resumed: it does not change what is trained, or threads are kept anyway."""


def distill(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    trust_pickle: bool = False,
    listen: Listen = lambda event: None,
) -> Bundle:
    """Train the recipe's student.

    Args:
        recipe: the resolved recipe.
        folder: the run's folder; the bundle is written to `folder/checkpoint`.
        resume: continue from the state an interrupted run of the same recipe left in `folder`.
        trust_pickle: let a file run code when it is read, where its digest is on the teacher's card or in the recipe.
        listen: called with an event for each step and each evaluation, and with those of downloads.

    Returns:
        The checkpoint bundle.

    Raises:
        ArtifactError: the folder is in use, holds a finished run, or the state to resume is missing or another recipe's.
        NumericsError: training diverged, or a teacher does not answer as is said of it.
        Interrupted: a signal asked for a stop; the state is saved.
    """
    with signals.graceful(), ExitStack() as held:
        team = join(recipe.train.device)
        folder = team.same(folder)
        done, work = folder / "checkpoint", folder / WORK
        with team.agreed():
            if team.main:
                held.enter_context(only_run(folder))
                if not _finished(done, recipe, resume):
                    _open_work(work, recipe, resume)
        if team.same(done.exists()):
            return Bundle.open(done, kind="checkpoint")
        listen = listen if team.main else lambda event: None
        with team.agreed():
            warning = _set_threads(recipe, work, resume, team)
            images = recipe.dataset.load("train")
            for message in filter(None, (warning, images.note)):
                listen({"event": "note", "message": message})
            again = resume and (work / "state.safetensors").is_file()
            loop, origins = _prepare(recipe, images, work, team, again=again, trust_pickle=trust_pickle, listen=listen)
            if again:
                loop.resume()
        listen({"event": "start", "epochs": recipe.train.epochs, "steps": loop.batches.steps, "progress": loop.progress})
        loop.run(listen)
        with team.agreed():
            if team.main:
                _write(done, recipe, loop, images, origins)
        return Bundle.open(done, kind="checkpoint")


def _finished(done: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether the bundle to resume is there already; another one in its place is an error."""
    if not done.exists():
        return False
    if resume and not difference(Bundle.open(done, kind="checkpoint").manifest.recipe, recipe.model_dump(mode="json")):
        return True
    raise ArtifactError("this run is finished", where=str(done), fix="choose another --output, or delete it")


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder for one run at a time; the lock falls with the process, however it ends.

    Raises:
        ArtifactError: another run holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ArtifactError(
            "another run is using this folder",
            where=str(folder),
            fix="wait for it, or choose another --output",
        ) from None
    except OSError as error:
        raise ArtifactError(f"cannot write here: {error.strerror}", where=str(folder), fix="choose another --output") from error
    try:
        yield
    finally:
        lock.release()


def _open_work(work: Path, recipe: Recipe, resume: bool) -> None:
    told = work / "recipe.json"
    asked = recipe.model_dump(mode="json")
    if not told.exists():
        if resume:
            raise ArtifactError("there is nothing to resume here", where=str(work.parent), fix="start without --resume")
        work.mkdir(parents=True, exist_ok=True)
        write_json(told, asked)
        return
    if not resume:
        raise ArtifactError(
            "an unfinished run is here",
            where=str(work.parent),
            fix="continue it with --resume, or choose another --output",
        )
    try:
        before = json.loads(told.read_bytes())
    except ValueError as error:
        raise ArtifactError(
            f"recipe.json is damaged: {error}", where=str(told), fix="start again in another --output"
        ) from error
    if changed := difference(before, asked):
        raise ArtifactError(
            f"the unfinished run has another recipe: {changed}",
            where=str(told),
            fix="resume with the same recipe and --set",
        )


def difference(before: Any, after: Any, key: str = "") -> str:
    """The first key in which two resolved recipes differ, or ""; what does not change the student may."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            inner = f"{key}.{name}".lstrip(".")
            if inner not in _NO_MATTER and (found := difference(before.get(name), after.get(name), inner)):
                return found
        return ""
    return "" if before == after else f"{key} was {before}, is {after}"


def _set_threads(recipe: Recipe, work: Path, resume: bool, team: Team) -> str:
    """Set the CPU threads; a resumed run keeps its own, for another count rounds differently."""
    file = work / "threads"
    wanted = recipe.train.threads
    if wanted is None and resume and file.is_file():
        wanted = int(file.read_text())
    count, warning = threads.choose(wanted, processes=team.here)
    torch.set_num_threads(count)
    if team.main:
        bundles.write_atomic(file, str(count).encode())
    return warning


def _prepare(
    recipe: Recipe, images: ImageSet, work: Path, team: Team, *, again: bool, trust_pickle: bool, listen: Listen
) -> tuple[Loop, dict[str, Any]]:
    """The loop of a run begun, or begun `again`, and what the manifest says of the weights that others made."""
    train, held = divide(images, recipe)
    if len(train) < 2:
        raise ConfigError("fewer than two training images are left", where="dataset", fix="lower dataset.holdout")
    (channels, height, width), classes = train.shape, len(train.classes)
    outside: dict[str, Any] = {"root": recipe.dataset.folder(), "trust_pickle": trust_pickle, "listen": listen}

    def say(message: str) -> None:
        listen({"event": "teacher", "message": message})

    verifier = Verifier(recipe.dataset, team.place.device, work / "teachers.json", say)
    teachers, origins = load_teachers(
        recipe.teachers,
        channels=channels,
        classes=classes,
        device=team.place.device,
        size=(height, width),
        dataset=recipe.dataset.name,
        names=train.classes,
        threat=recipe.threat,
        measure=verifier if team.main and recipe.train.verify_teacher else None,
        record=team.main,
        **outside,
    )
    told, begun = {"teachers": origins}, work / "student_init.json"
    if recipe.student_init is None or (again and begun.is_file()):  # the state that is saved is further on
        loop = Loop(recipe, train=train, held=held, teachers=teachers, team=team, folder=work)
        return loop, told | ({"student_init": json.loads(begun.read_bytes())} if recipe.student_init else {})
    start = read_start(recipe.student_init, recipe.student, record=team.main, **outside)
    loop = Loop(recipe, train=train, held=held, teachers=teachers, team=team, folder=work, start=start.into)
    if team.main:
        write_json(begun, start.origin)
    return loop, told | {"student_init": start.origin}


def _write(done: Path, recipe: Recipe, loop: Loop, train: ImageSet, origins: dict[str, Any]) -> None:
    """The bundle: the best student (the last where nothing was held out), the last one, and the metrics."""
    from safetensors.torch import save_file

    model = ModelInfo(architecture=recipe.student.architecture, classes=train.classes, input_shape=train.shape)
    last = portable(loop.addons.outcome)
    fields: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "model": model,
        "threat": recipe.threat,
        **origins,
        "selected": {"by": recipe.train.select, "best": loop.progress.best, "last": loop.progress.last},
        "training": {
            "seconds": round(loop.progress.seconds, 1),
            "data_sha256": train.sha256,
            "threads": torch.get_num_threads(),
            "processes": loop.place.world,
        },
        "hardware": {"device": _device_name(loop)},
    }
    with bundles.create(done, "checkpoint", **fields) as (work, _):
        save_file(loop.best or last, work / "model.safetensors", metadata={"format": "pt"})
        save_file(last, work / "last.safetensors", metadata={"format": "pt"})
        (work / "metrics.jsonl").write_bytes((loop.folder / "metrics.jsonl").read_bytes())


def _device_name(loop: Loop) -> str:
    device = loop.place.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
