"""step: one training step of each method through our loop, against the plain step of `bench/reference/steps.py`.

Nets and sizes are the quickstart's, with random weights and images. Before anything is timed both take one step from
the same weights with the same start noise, and their losses must agree. They do so in float64: in float32 the layouts
add in another order, and a gradient near zero may then change its sign, in TRADES's attack most of all.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.reference.steps import STEPS, Setting, Step
from bench.timing import Row, interleave
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet
from robustkd.methods._base import Clock
from robustkd.models.resnet18 import ResNet18Config
from robustkd.recipe.schema import Recipe
from robustkd.training.batches import ATTACK
from robustkd.training.loop import Loop
from robustkd.training.seeds import generator
from robustkd.training.teachers import freeze
from robustkd.training.team import join

TOLERANCE = 1e-9
"""Largest difference of the two losses in float64."""

CLOCK = Clock(epoch=0, epochs=1, step=0)


class Different(Exception):
    """Ours and the reference do not compute the same."""


@dataclass(frozen=True)
class Size:
    """Of nets, images and the inner problem."""

    student: float = 0.125
    teacher: float = 0.25
    pixels: int = 28
    batch: int = 64
    steps: int = 4


def rows(*, quick: bool) -> Iterator[Row]:
    for name in Shelf("methods").names():
        if name not in STEPS:
            print(f"{name}: no reference step, left out", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            Pair(name, Size(), Path(folder), dtype=torch.float64).check()
            pair = Pair(name, Size(), Path(folder))
            yield interleave(pair.case, pair.ours, pair.reference, pairs=11 if quick else 51, warm=2)


class Pair:
    """Both sides of one method, from the same weights and on the same batch."""

    def __init__(self, name: str, size: Size, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        recipe = recipe_for(name, size)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (size.batch, 1, size.pixels, size.pixels), dtype=np.uint8)
        labels = np.arange(size.batch) % 10
        train = ImageSet(images, labels, tuple(map(str, range(10))), "random", "train")
        self.x, self.y = torch.from_numpy(images).to(dtype) / 255, torch.from_numpy(labels)
        torch.manual_seed(1)
        teacher, plain_teacher = (ResNet18Config(width=size.teacher, stem_stride=2).build(channels=1, classes=10) for _ in "ab")
        plain_teacher.load_state_dict(teacher.state_dict())
        teachers = {role: freeze(teacher).to(memory_format=torch.channels_last) for role in recipe.method_class().roles}
        for net in (teacher, plain_teacher):
            net.to(dtype)
        self.loop = Loop(recipe, train=train, held=train, teachers=teachers, team=join("cpu"), folder=folder)
        self.loop.student.to(dtype)
        self.case = f"{name}/resnet18-w{size.student:g}" + (f"/resnet18-w{size.teacher:g}" if teachers else "")

        knobs = recipe.train
        self.student = recipe.student.build(channels=1, classes=10).to(dtype)
        self.student.load_state_dict(self.loop.student.state_dict())
        optimizer = torch.optim.SGD(
            self.student.parameters(), lr=knobs.lr, momentum=knobs.momentum, weight_decay=knobs.weight_decay
        )
        inner, eps = recipe.inner, recipe.threat.eps
        self.setting = Setting(self.student, freeze(plain_teacher), optimizer, eps, inner.step_size, inner.steps)
        self.plain: Step = STEPS[name]

    def ours(self, *, report: bool = False) -> dict[str, float]:
        """A step of our loop."""
        return self.loop.step(self.x, self.y, CLOCK, report=report)

    def reference(self) -> Tensor:
        """A step of the reference, its attack starting where ours does."""
        rng = generator(0, 0, 0, 0, ATTACK, device=self.x.device)
        noise = 0.001 * torch.randn(self.x.shape, generator=rng, dtype=self.x.dtype)
        return self.plain(self.setting, self.x, self.y, noise)

    def check(self) -> float:
        """Take a step on both sides; the difference of their losses.

        Raises:
            Different: it is above the tolerance.
        """
        ours, reference = self.ours(report=True)["loss"], float(self.reference())
        if not abs(ours - reference) <= TOLERANCE:
            raise Different(f"{self.case}: our loss is {ours}, the reference's {reference}; nothing was timed")
        return abs(ours - reference)


def recipe_for(name: str, size: Size) -> Recipe:
    """The quickstart's settings for another method; teachers are handed to the loop, never read from a path."""
    roles = Shelf("methods").get(name).roles
    return Recipe.model_validate(
        {
            "dataset": {"name": "fashion-mnist-10k"},
            "student": {"name": "resnet18", "width": size.student, "stem_stride": 2},
            "teachers": [{"role": role, "path": "random", "model": {"name": "resnet18"}} for role in roles],
            "inner": {"steps": size.steps, "step_size": "3/255"},
            "method": {"name": name},
            "train": {"batch_size": size.batch, "schedule": {"name": "constant"}, "device": "cpu"},
        }
    )
