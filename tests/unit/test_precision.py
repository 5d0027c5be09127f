"""Half precision and the attack's signs, on trained nets and real images (methods.md, section 1.8).

A steepest step looks at signs only. Under bf16 autocast a few of a hundred differ from fp32's, all of gradients near
zero, hence `inner.precision` is fp32 unless a recipe says otherwise, also where `train.precision` is bf16. On logits cut
to half precision before the softmax about every third sign is another.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkd.ascent import Objective
from robustkd.datasets._base import ImageSet
from robustkd.datasets.fashion_mnist_10k import ENTRY as FashionMnist10k
from robustkd.losses import cross_entropy, full, kl
from robustkd.recipe.schema import Recipe, TeacherConfig
from robustkd.threat import ThreatModel
from robustkd.training import loop as loops
from robustkd.training.loop import Loop
from robustkd.training.teachers import load_teachers
from robustkd.training.team import join
from tests.nets import CLOCK

CPU = torch.device("cpu")
TEACHER = "fashion-mnist-resnet18"
ROWS = 128
AGREEMENT = 0.99
"""Of the signs with those of fp32: what the project asks of an attack in training."""


@pytest.fixture(scope="module")
def data() -> ImageSet:
    held = FashionMnist10k().load("train")
    return held.take(torch.arange(ROWS).numpy())


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    nets, _ = load_teachers((TeacherConfig(id=TEACHER),), channels=1, classes=10, device=CPU)
    return nets["robust"]


@pytest.fixture(scope="module")
def student(teacher: nn.Module) -> nn.Module:
    """A second trained net: the teacher with a tenth of each tensor's spread added, about as accurate."""
    net, rng = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=rng))
    return net


@pytest.fixture(scope="module")
def start(data: ImageSet) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and where the attack starts."""
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    return x, y, ThreatModel().start(x, "noise", torch.Generator().manual_seed(1))


def gradient(objective: Objective, x_adv: Tensor, half: torch.dtype | None = None) -> Tensor:
    """Of the batch sum, the forward pass under autocast where `half` is given."""
    x_adv = x_adv.detach().requires_grad_(True)
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        value = objective(x_adv).sum()
    (grad,) = torch.autograd.grad(value, x_adv)
    return grad


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of equal signs."""
    return (a.sign() == b.sign()).float().mean().item()


def objectives(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, *, loss_in: torch.dtype | None = None) -> Any:
    """The inner objectives of PGD-AT, RSLAD and AdaAD; with `loss_in`, softmax and divergence in that precision."""
    with torch.no_grad():
        target = teacher(x)

    def divergence(reference: Tensor, logits: Tensor) -> Tensor:
        if loss_in is None:
            return kl(reference, logits)
        log_p, log_q = (F.log_softmax(z.to(loss_in), dim=1) for z in (reference, logits))
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def on_label(logits: Tensor) -> Tensor:
        if loss_in is None:
            return cross_entropy(logits, y)
        return F.nll_loss(F.log_softmax(logits.to(loss_in), dim=1), y, reduction="none")

    return {
        "pgd-at": lambda x_adv: on_label(student(x_adv)),
        "rslad": lambda x_adv: divergence(target, student(x_adv)),
        "adaad": lambda x_adv: divergence(teacher(x_adv), student(x_adv)),
    }


METHODS = ("pgd-at", "rslad", "adaad")


def search(
    name: str,
    data: ImageSet,
    teacher: nn.Module,
    student: nn.Module,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    train: str = "fp32",
    inner: str | None = None,
    speed: str = "auto",
) -> Tensor:
    """The gradient of the first step of the search, as the training loop sets it up."""
    sections: dict[str, Any] = {
        "dataset": "fashion-mnist-10k",
        "student": {"name": "resnet18", "width": 0.25, "stem_stride": 2},
        "teachers": [{"id": TEACHER}] if name != "pgd-at" else [],
        "method": name,
        "inner": {} if inner is None else {"precision": inner},
        "train": {"precision": train, "device": "cpu", "tensorboard": False, "speed": speed},
    }
    recipe = Recipe.model_validate(sections)
    teachers = {role: teacher for role in recipe.method_class().roles}
    loop = Loop(recipe, train=data, held=data, teachers=teachers, team=join("cpu"), folder=folder)
    loop.student.load_state_dict(student.state_dict())
    found: list[Tensor] = []

    def spy(objective: Objective, x: Tensor, *, threat: ThreatModel, start: Any, rng: Any, **rest: Any) -> Tensor:
        x_adv = threat.start(x, start, rng).detach().requires_grad_(True)
        found.extend(torch.autograd.grad(objective(x_adv).sum(), x_adv))
        return x

    monkeypatch.setattr(loops, "ascend", spy)
    loop.step(torch.from_numpy(data.floats()), torch.from_numpy(data.labels), CLOCK, report=False)
    return found[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_attack_of_bf16_training_has_the_signs_of_fp32(name, data, teacher, student, tmp_path, monkeypatch):
    nets = (data, teacher, student, tmp_path, monkeypatch)
    alone = search(name, *nets)
    assert alone.count_nonzero() > 0.99 * alone.numel()
    assert agreement(alone, search(name, *nets, train="bf16")) >= AGREEMENT


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_can_ask_for_a_bf16_search_and_gets_fewer_equal_signs(name, data, teacher, student, tmp_path, monkeypatch):
    nets = (data, teacher, student, tmp_path, monkeypatch)
    exact, half = search(name, *nets), search(name, *nets, inner="bf16")
    equal = agreement(exact, half)
    assert 0.9 < equal < AGREEMENT, "why fp32 is what is searched in by default"
    turned = exact.sign() != half.sign()
    assert exact[turned].abs().sum() < 0.02 * exact.abs().sum(), "gradients near zero are turned, no others"


def test_only_the_outer_problem_follows_the_training_precision(data, teacher, student, tmp_path, monkeypatch):
    nets = ("rslad", data, teacher, student, tmp_path, monkeypatch)
    seen: list[torch.dtype] = []
    hook = teacher.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    try:
        search(*nets, train="bf16", speed="safe")
        search(*nets, inner="bf16", speed="safe")
    finally:
        hook.remove()
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32], "inner, outer; inner, outer"


@pytest.mark.parametrize("name", METHODS)
def test_softmax_and_divergence_are_in_float32_under_autocast(name, teacher, student, start):
    x, y, x_adv = start
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student(x).dtype == torch.bfloat16
        assert objectives(student, teacher, x, y)[name](x_adv).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_without_float32_losses_many_more_signs_turn(name, half, teacher, student, start):
    """The nets stay in fp32 here: the loss alone does it."""
    x, y, x_adv = start
    exact = gradient(objectives(student, teacher, x, y)[name], x_adv)
    cut = gradient(objectives(student, teacher, x, y, loss_in=half)[name], x_adv)
    assert 1 - agreement(exact, cut) > 5 * (1 - AGREEMENT)
    under_bf16 = gradient(objectives(student, teacher, x, y)[name], x_adv, torch.bfloat16)
    if half == torch.bfloat16:
        assert agreement(exact, cut) < agreement(exact, under_bf16) - 0.05, "worse than the whole net in bf16"


@pytest.mark.parametrize("name", METHODS)
def test_fp16_loses_pixels_to_underflow_unless_the_objective_is_scaled(name, teacher, student, start):
    """Exactly zero has no sign, and the pixel stays where it is; bf16 has the range of fp32. So fp16 is not offered."""
    x, y, x_adv = start
    objective = objectives(student, teacher, x, y)[name]
    exact = gradient(objective, x_adv)
    zeros = {half: 1 - gradient(objective, x_adv, half).count_nonzero().item() / x.numel() for half in HALVES}
    assert zeros[None] < 0.001 and zeros[torch.bfloat16] < 0.005 and zeros[torch.float16] > 0.02
    scaled = gradient(lambda z: 2**12 * objective(z), x_adv, torch.float16)
    assert agreement(exact, scaled) >= AGREEMENT


HALVES = (None, torch.bfloat16, torch.float16)


def test_losses_widen_half_logits_once_and_leave_float64_alone():
    z = torch.randn(4, 10, dtype=torch.float64)
    assert full(z) is z and full(z.bfloat16()).dtype == full(z.half()).dtype == torch.float32
