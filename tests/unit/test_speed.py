"""`train.speed`: what is quicker must train the same student; `safe` leaves every network as it came."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bench.step import short_cuts
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet
from robustkd.methods._base import Clock
from robustkd.recipe.schema import Recipe
from robustkd.training.evaluate import evaluate
from robustkd.training.loop import Loop
from robustkd.training.teachers import freeze
from robustkd.training.team import join

MODEL = {"name": "resnet18", "width": 0.0625, "stem_stride": 2}


@pytest.fixture(scope="module")
def data() -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 1, 12, 12), dtype=np.uint8)
    return ImageSet(images, np.arange(24) % 10, tuple(map(str, range(10))), "random", "train")


def loop_of(name: str, speed: str, data: ImageSet, folder, **sections) -> Loop:
    roles = Shelf("methods").get(name).roles
    recipe = Recipe.model_validate(
        {
            "dataset": "fashion-mnist-10k",
            "student": MODEL,
            "teachers": [{"role": role, "path": "random", "model": MODEL} for role in roles],
            "inner": {"steps": 2, **sections.pop("inner", {})},
            "method": name,
            "train": {"batch_size": 8, "device": "cpu", "tensorboard": False, "speed": speed},
            **sections,
        }
    )
    torch.manual_seed(7)
    teachers = {role: freeze(recipe.student.build(channels=1, classes=10).double()) for role in roles}
    made = Loop(recipe, train=data, held=data, teachers=teachers, team=join("cpu"), folder=folder)
    made.student.double()
    return made


def trained(loop: Loop, data: ImageSet, steps: int = 3) -> dict[str, torch.Tensor]:
    x, y = torch.from_numpy(data.floats()).double(), torch.from_numpy(data.labels)
    for step in range(steps):
        part = slice(8 * step, 8 * step + 8)
        loop.step(x[part], y[part], Clock(0, 1, step), report=False)
    return loop.student.state_dict()


@pytest.mark.parametrize("name", Shelf("methods").names())
def test_both_speeds_train_the_same_student(name, data, tmp_path):
    with short_cuts():  # as if teachers were wide and the student's answers large
        quick, safe = (trained(loop_of(name, speed, data, tmp_path), data) for speed in ("auto", "safe"))
    for key, value in safe.items():
        torch.testing.assert_close(quick[key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_an_attack_with_batch_statistics_is_not_folded(data, tmp_path):
    batch = {"inner": {"batch_norm": "train"}}
    quick, safe = (trained(loop_of("pgd-at", speed, data, tmp_path, **batch), data) for speed in ("auto", "safe"))
    assert all(torch.equal(quick[key], safe[key]) for key in safe), "there is nothing to fold, and so no other bit"


def test_safe_asks_the_networks_themselves(data, tmp_path):
    seen = []
    for speed in ("auto", "safe"):
        loop = loop_of("rslad", speed, data, tmp_path)
        norms = [m for net in (loop.student, *loop.teachers.values()) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        calls = []
        for norm in norms:
            norm.register_forward_hook(lambda module, args, out, calls=calls: calls.append(module.training))
        trained(loop, data, steps=1)
        seen.append((calls.count(True), calls.count(False)))
    (outer, folded), (plain_outer, plain) = seen
    assert outer == plain_outer > 0, "the outer problem trains the student's own norms"
    assert folded == 0 < plain


def test_selection_counts_the_same(data, tmp_path):
    loop = loop_of("pgd-at", "auto", data, tmp_path)
    trained(loop, data)
    net = loop.student.float()
    plain, quick = (
        evaluate(net, data, loop.recipe.threat, seed=0, device=torch.device("cpu"), quick=other)
        for other in (None, loop._fast.refreshed())
    )
    assert plain == quick
