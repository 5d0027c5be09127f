"""One training step of every method on the device: finite in fp32 and bf16, and the CPU's student after it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.place import Place
from bench.sizes import QUICKSTART, tiny
from bench.step import CLOCK, recipe_for
from robustkd.ascent import ascend
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet
from robustkd.training.loop import Loop
from robustkd.training.teachers import freeze
from robustkd.training.team import join
from tests.gpu.conftest import CUDA

METHODS = Shelf("methods").names()
SIZE = tiny(QUICKSTART)
DOUBLE, SINGLE = 1e-7, 0.02
"""How far the updates of the two students may lie apart, as a share of their length."""
LOOSE = {"trades": 0.5}
"""In float32 a gradient near zero changes its sign with the order of a sum, and a pixel of the attack moves the other way.
TRADES begins where its gradient vanishes: kernels of the same CPU lie 0.12 apart. In float64 it is held as all are."""


class Stepped:
    """One step of a method from weights, images and start noise that are the same on every device.

    Args:
        method: of the shelf.
        device: where the step is taken.
        folder: for the loop's files.
        dtype: of the weights.
        precision: `fp32`, `bf16`, or `bf16-attack`, which has the search in bf16 too.
    """

    def __init__(
        self, method: str, device: str, folder: Path, *, dtype: torch.dtype = torch.float32, precision: str = "fp32"
    ) -> None:
        recipe, size = recipe_for(method, SIZE, Place(device=device, precision=precision)), SIZE
        shape = (size.batch, size.channels, size.pixels, size.pixels)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        data = ImageSet(pixels, np.arange(size.batch) % 10, tuple(map(str, range(10))), "random", "train")
        torch.manual_seed(1)
        teachers: dict[Any, Any] = {}
        for teacher in recipe.teachers:
            assert teacher.model is not None
            teachers[teacher.role] = freeze(teacher.model.build(channels=size.channels, classes=10).to(device, dtype))
        loop = Loop(recipe, train=data, held=data, teachers=teachers, team=join(device), folder=folder)
        loop.student.to(dtype)
        before = update_of(loop.student)
        # a generator draws other numbers on a GPU: both get the points that the CPU draws
        x = torch.from_numpy(pixels).to(dtype) / 255
        start = loop.method.start
        if start != "zero" and loop.method.adversarial:
            rng = torch.Generator().manual_seed(0)
            first = ascend(lambda z: z.sum(), x, threat=recipe.search_threat(), steps=0, step_size=0, start=start, rng=rng)
            loop.method.start = first.to(device)  # type: ignore[misc, assignment]  # what a search starts from may be points
        y = torch.from_numpy(data.labels).to(device)
        self.values = loop.step(x.to(device), y, CLOCK, report=True)
        self.place = next(loop.student.parameters()).device.type
        self.update = update_of(loop.student) - before


def update_of(net: torch.nn.Module) -> Tensor:
    """All parameters in one row, in float64 on the CPU."""
    return torch.cat([p.detach().double().cpu().flatten() for p in net.parameters()])


def held(method: str, device: str, plain: Any, folder: Path, dtype: torch.dtype) -> float:
    """How far apart the updates are, after all that must hold for any number."""
    with plain():
        wanted = Stepped(method, "cpu", folder / "plain", dtype=dtype)
    found = Stepped(method, device, folder / "device", dtype=dtype)
    assert found.place == device and wanted.place == "cpu"
    assert wanted.update.norm() > 0 and bool(found.update.isfinite().all())
    assert found.values["loss"] == pytest.approx(wanted.values["loss"], rel=1e-2, abs=1e-5)
    return float((found.update - wanted.update).norm() / wanted.update.norm())


@pytest.mark.parametrize("method", METHODS)
def test_the_student_is_the_cpus(method: str, device: str, plain: Any, tmp_path: Path) -> None:
    assert held(method, device, plain, tmp_path, torch.float32) <= LOOSE.get(method, SINGLE)


@pytest.mark.parametrize("place", [CUDA])  # on a CPU there is one set of kernels for float64
@pytest.mark.parametrize("method", METHODS)
def test_in_float64_it_is_the_cpus_to_the_last_digits(method: str, place: str, plain: Any, tmp_path: Path) -> None:
    assert held(method, place, plain, tmp_path, torch.float64) <= DOUBLE


@pytest.mark.parametrize("precision", ["bf16", "bf16-attack"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bf16_is_finite_and_moves_the_student(method: str, precision: str, device: str, tmp_path: Path) -> None:
    found = Stepped(method, device, tmp_path, precision=precision)
    assert all(np.isfinite(value) for value in found.values.values())
    assert bool(found.update.isfinite().all()) and found.update.norm() > 0
