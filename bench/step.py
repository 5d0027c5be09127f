"""step: one training step of each method through our loop, against the plain step of `bench/reference/steps.py`.

Cases are named method/student/teacher. Those of the papers (`dgad/mnv2/wrn-34-10`) have their networks on colour images
of 32 pixels and ten attack steps; the others have the quickstart's small ones. Weights and images are random.

Before anything is timed both sides take two steps from the same weights with the same start noise; their losses must
agree, and so must the students after them. They do so in float64, on narrow networks of the same families: in float32
the layouts add in another order, and a gradient near zero may then change its sign, in TRADES's attack most of all.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from bench.place import HERE, Place
from bench.reference.steps import STEPS, Setting, Step
from bench.sizes import QUICKSTART, STUDENTS, TEACHERS, Size, paper, tiny
from bench.timing import Row, interleave
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet
from robustkd.heap import kept
from robustkd.methods._base import Clock
from robustkd.recipe.schema import AnyModel, Recipe
from robustkd.training.batches import ATTACK
from robustkd.training.loop import Loop
from robustkd.training.seeds import generator
from robustkd.training.teachers import freeze
from robustkd.training.team import join

TOLERANCE, RELATIVE = 1e-9, 1e-6
"""Largest difference in float64 of the two losses, and of the students they lead to; also as a share of the value."""
CLOCK = Clock(epoch=0, epochs=1, step=0)
KNOBS: dict[str, dict[str, Any]] = {"iad": {"gate_epoch": 0}}
"""Where a paper's training does most of its work after an epoch that is not reached here."""
PAIRS = {"papers, quick": 1, "papers": 7, "quickstart, quick": 3, "quickstart": 51}
SHORT_CUTS: dict[str, dict[str, Any]] = {
    "robustkd.models._winograd": {"CHANNELS": 1, "WORK": 0},
    "robustkd.models._fold": {"LARGE": 0},
    "robustkd.training.recompute": {"LEAST": 0},
}
"""Modules, and from which sizes on they do what `train.speed: auto` does with large networks and batches."""
QUICK_METHODS, QUICK_STUDENTS = ("dgad",), ("mnv2",)
"""What a quick run times on the papers' networks."""


class Different(Exception):
    """Ours and the reference do not compute the same."""


def rows(*, quick: bool, place: Place = HERE) -> Iterator[Row]:
    for method, size in cases(quick=quick, device=place.device, batch=place.batch):
        if not place.wants(case_of(method, size)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            with short_cuts():
                Pair(method, tiny(size), Path(folder), dtype=torch.float64).check()
            pair = Pair(method, size, Path(folder), place=place)
            kind = ("quickstart" if size is QUICKSTART else "papers") + (", quick" if quick else "")
            ready = pair.within, pair.outside
            pairs = place.pairs or PAIRS[kind]
            row = interleave(pair.case, pair.ours, pair.reference, pairs=pairs, settle=place.settle, ready=ready)
        facts = {"batch": size.batch, "steps": size.steps, "pixels": size.pixels}
        yield {**row, **facts, "device": place.device, "precision": place.precision, "speed": place.speed}


@contextmanager
def short_cuts() -> Iterator[None]:
    """Small networks take the short cuts of large ones inside."""
    with ExitStack() as small:
        for module, sizes in SHORT_CUTS.items():
            small.enter_context(patch.multiple(module, **sizes))
        yield


def cases(*, quick: bool, device: str = "cpu", batch: int = 0) -> Iterator[tuple[str, Size]]:
    """Every method on the quickstart's networks, and on those of the papers (a quick run: some methods)."""
    methods = [name for name in Shelf("methods").names() if name in STEPS]
    for name in set(Shelf("methods").names()) - set(STEPS):
        print(f"{name}: no reference step, left out", file=sys.stderr)
    yield from ((method, QUICKSTART) for method in methods)
    for method in methods:
        if quick and method not in QUICK_METHODS:
            continue
        for student in QUICK_STUDENTS if quick else STUDENTS:
            for teacher in TEACHERS if roles_of(method) else ("resnet-18",):
                yield method, paper(student, teacher, device=device, batch=batch)


def roles_of(method: str) -> tuple[Any, ...]:
    """The teachers a method wants here."""
    roles: tuple[Any, ...] = Shelf("methods").get(method).roles
    return roles


def case_of(method: str, size: Size) -> str:
    """The name of a case."""
    return size.name(method, teacher=bool(roles_of(method)))


class Pair:
    """Both sides of one method, from the same weights and on the same batch."""

    def __init__(self, name: str, size: Size, folder: Path, *, dtype: torch.dtype = torch.float32, place: Place = HERE) -> None:
        recipe = recipe_for(name, size, place)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (size.batch, size.channels, size.pixels, size.pixels), dtype=np.uint8)
        labels = np.arange(size.batch) % 10
        train = ImageSet(images, labels, tuple(map(str, range(10))), "random", "train")
        self.x = (torch.from_numpy(images).to(dtype) / 255).to(place.device)
        self.y = torch.from_numpy(labels).to(place.device)
        torch.manual_seed(1)
        plain = {t.role: self._teacher(t.model, size, dtype, place) for t in recipe.teachers}
        teachers: dict[Any, nn.Module] = {}
        for teacher in recipe.teachers:
            mine = self._teacher(teacher.model, size, dtype, place)
            mine.load_state_dict(plain[teacher.role].state_dict())
            teachers[teacher.role] = mine.to(memory_format=torch.channels_last)
        self.loop = Loop(recipe, train=train, held=train, teachers=teachers, team=join(place.device), folder=folder)
        self.loop.student.to(dtype)
        self.case = case_of(name, size)

        knobs = recipe.train
        self.student = recipe.student.build(channels=size.channels, classes=10).to(place.device, dtype)
        self.student.load_state_dict(self.loop.student.state_dict())
        optimizer = torch.optim.SGD(
            self.student.parameters(), lr=knobs.lr, momentum=knobs.momentum, weight_decay=knobs.weight_decay
        )
        inner, eps, first = recipe.inner, recipe.threat.eps, next(iter(plain.values()), self.student)
        clean = plain["clean"] if len(plain) > 1 else None
        self.setting = Setting(self.student, first, optimizer, eps, inner.step_size, inner.steps, clean)
        self.plain: Step = STEPS[name]
        self.memory = ExitStack()

    @staticmethod
    def _teacher(model: AnyModel | None, size: Size, dtype: torch.dtype, place: Place) -> nn.Module:
        assert model is not None  # `recipe_for` gives one
        return freeze(model.build(channels=size.channels, classes=10).to(place.device, dtype))

    def ours(self, *, report: bool = False) -> dict[str, float]:
        """A step of our loop."""
        return self.loop.step(self.x, self.y, CLOCK, report=report)

    def within(self) -> None:
        """Be as in the middle of a run: `auto` keeps memory from step to step."""
        if self.loop.recipe.train.speed == "auto" and self.x.device.type == "cpu":
            self.memory.enter_context(kept())
            self.ours()

    def outside(self) -> None:
        """Leave that state, for the reference."""
        self.memory.close()

    def reference(self) -> Tensor:
        """A step of the reference, its attack starting where ours does."""
        rng = generator(0, 0, 0, 0, ATTACK, device=self.x.device)
        noise = torch.empty_like(self.x)
        if self.loop.method.start == "uniform":
            noise.uniform_(-self.setting.eps, self.setting.eps, generator=rng)
        else:
            noise.normal_(generator=rng).mul_(0.001)
        return self.plain(self.setting, self.x, self.y, noise)

    def check(self) -> float:
        """Take two steps on both sides, for some methods remember the first; the largest difference of their losses.

        Raises:
            Different: losses, or the students they lead to, differ by more than the tolerance.
        """
        gaps = [self._gap() for _ in range(2)]
        theirs = self.student.state_dict()
        for key, value in self.loop.student.state_dict().items():
            if not torch.allclose(value, theirs[key], rtol=RELATIVE, atol=TOLERANCE):
                raise Different(f"{self.case}: {key} differs after two steps; nothing was timed")
        return max(gaps)

    def _gap(self) -> float:
        ours, reference = self.ours(report=True)["loss"], float(self.reference())
        if not abs(ours - reference) <= min(TOLERANCE, RELATIVE * abs(reference)):
            raise Different(f"{self.case}: our loss is {ours}, the reference's {reference}; nothing was timed")
        return abs(ours - reference)


def recipe_for(name: str, size: Size, place: Place = HERE) -> Recipe:
    """A method with its own settings on networks of a size; teachers are handed to the loop, never read from a path."""
    roles = roles_of(name)
    models = {role: size.teachers[1] for role in roles}
    if len(roles) > 1:
        models["clean"] = size.clean()
    return Recipe.model_validate(
        {
            "dataset": {"name": "cifar10" if size.channels == 3 else "fashion-mnist-10k"},
            "student": size.students[1],
            "teachers": [{"role": role, "path": "random", "model": model} for role, model in models.items()],
            "inner": {
                "steps": size.steps,
                "step_size": size.step_size,
                "precision": "bf16" if place.precision == "bf16-attack" else "fp32",
            },
            "method": {"name": name, **KNOBS.get(name, {})},
            "train": {
                "batch_size": size.batch,
                "lr": 0.01,  # random labels and scales: it must not diverge while it is timed
                "schedule": {"name": "constant"},
                "device": place.device,
                "precision": place.precision.partition("-")[0],
                "speed": place.speed,
            },
        }
    )
