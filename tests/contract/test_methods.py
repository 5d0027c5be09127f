"""What every entry of the methods shelf keeps, whatever its paper."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustkd.ascent import ascend, attacking
from robustkd.catalog import Shelf
from robustkd.methods._base import Batch, Method, Nets
from robustkd.threat import ThreatModel
from tests.nets import SmallNet, frozen, images, labels, make, outer, picture, readers

NAMES = Shelf("methods").names()
THREAT = ThreatModel(eps=8 / 255)
STEPS = 3

#: passes of the student in one outer step, methods.md section 1.4: c = clean, a = adversarial, m = mirrored, x - (x' - x)
PASSES = {
    "standard": "c",
    "pgd-at": "ac",
    "trades": "cac",
    "rslad": "ac",
    "adaad": "ca",
    "advfunmatch": "ca",
    "dgad": "ca",
    "mtard": "ac",
    "b-mtard": "ac",
    "mart": "ca",
    "ard": "ac",
    "iad": "ac",
    "akd": "ac",
    "kd": "c",
    "saad": "amc",
}

every = pytest.mark.parametrize("name", NAMES)
adversarial = pytest.mark.parametrize("name", [n for n in NAMES if Shelf("methods").get(n).adversarial])
taught = pytest.mark.parametrize("name", [n for n in NAMES if Shelf("methods").get(n).roles])


def nets_for(method: Method[Any, Any], *, classes: int = 10) -> Nets:
    roles = type(method).roles
    return Nets(SmallNet(classes), {role: frozen(SmallNet(classes, seed=7 + i)) for i, role in enumerate(roles)})


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attack(method: Method[Any, Any], nets: Nets, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """x_adv as training finds it: the objective is made, and climbed, in the method's attack mode."""
    values: dict[str, Any] = {"steps": STEPS, "step_size": 2 / 255, "start": method.start, "rng": rng()} | settings
    with attacking(nets.student, method.attack_mode):
        return ascend(method.inner(nets, x, y), x, threat=THREAT, **values)


def step(method: Method[Any, Any], nets: Nets, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    nets.student.train()
    loss, terms, _ = outer(method, nets, Batch(x, y, x_adv))
    return loss, terms


def parameter_gradient(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# --- the entry itself


@every
def test_entry_says_what_it_is(name: str) -> None:
    entry = Shelf("methods").get(name)
    module = inspect.getmodule(entry)
    assert module is not None and module.__doc__ and entry.__doc__ and entry.loss.__doc__ and entry.inner.__doc__
    assert name == "standard" or "Departures" in module.__doc__
    for text in (entry.summary, entry.paper, entry.equation, entry.departures):
        assert isinstance(text, str) and text.strip()
    assert "outer:" in entry.equation
    assert not entry.adversarial or "inner:" in entry.equation
    assert entry.Config(name=name).name == name


@every
def test_config_refuses_unknown_keys_other_names_and_infinite_knobs(name: str) -> None:
    config = Shelf("methods").get(name).Config
    with pytest.raises(ValidationError, match="not permitted"):
        config(name=name, no_such_knob=1)
    with pytest.raises(ValidationError):
        config(name="another")
    with pytest.raises(ValidationError):
        config(name=name).name = "changed"
    for field, info in config.model_fields.items():
        if info.annotation is float:
            for value in (float("inf"), float("nan")):
                with pytest.raises(ValidationError):
                    config(**{"name": name, field: value})


@every
def test_every_knob_is_explained(name: str) -> None:
    fields = Shelf("methods").get(name).Config.model_fields
    assert [field for field, info in fields.items() if field != "name" and not info.description] == []


@every
def test_state_survives_json(name: str) -> None:
    method = make(name)
    state = method.init()
    assert method.restore(json.loads(json.dumps(method.save(state)))) == state


# --- the attack (methods.md 3.1)


@adversarial
def test_attack_stays_inside_ball_and_range(name: str) -> None:
    method = make(name)
    x = images()
    x[0], x[1] = 0.0, 1.0
    x_adv = attack(method, nets_for(method), x, labels())
    assert (x_adv - x).abs().max() <= THREAT.eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad and x_adv.shape == x.shape


@adversarial
def test_attack_raises_its_objective(name: str) -> None:
    method, x, y = make(name), images(), labels()
    nets = nets_for(method)
    with attacking(nets.student, "eval"):
        objective = method.inner(nets, x, y)
        start = THREAT.start(x, "noise", rng())
        assert objective(attack(method, nets, x, y, steps=10)).mean() > objective(start).mean()
        assert objective(x).shape == (len(x),)


@adversarial
def test_attack_moves_running_statistics_only_in_train_mode(name: str) -> None:
    method, x, y = make(name), images(), labels()
    nets = nets_for(method)
    nets.student.train()
    before = copy.deepcopy(dict(nets.student.named_buffers()))
    with attacking(nets.student, "eval"):
        ascend(method.inner(nets, x, y), x, threat=THREAT, steps=STEPS, step_size=2 / 255, rng=rng())
    assert nets.student.training
    for key, value in nets.student.named_buffers():
        assert torch.equal(value, before[key]), f"{key} moved in eval mode"
    with attacking(nets.student, "train"):
        objective = method.inner(nets, x, y)
        moved = int(nets.student.norm.num_batches_tracked)
        ascend(objective, x, threat=THREAT, steps=STEPS, step_size=2 / 255, rng=rng())
    assert int(nets.student.norm.num_batches_tracked) == moved + STEPS
    assert not torch.equal(nets.student.norm.running_mean, before["norm.running_mean"])


@adversarial
def test_attack_leaves_no_gradient_behind(name: str) -> None:
    method = make(name)
    nets = nets_for(method)
    attack(method, nets, images(), labels())
    for net in (nets.student, *nets.teachers.values()):
        assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in nets.student.parameters())


@adversarial
def test_gradient_goes_through_the_teacher_exactly_where_declared(name: str) -> None:
    """The teacher's side of the gradient at x', on logits written in the image."""
    method, classes = make(name), 10
    generator = rng(3)
    s, a, t, u = torch.randn(4, 6, classes, generator=generator).double()
    x, x_adv = picture(s, t), picture(a, u).requires_grad_(True)
    values = method.inner(readers(classes), x, labels())(x_adv)
    (grad,) = torch.autograd.grad(values.sum(), x_adv)
    through_teacher = grad[:, classes:]
    if method.through_teacher:
        assert (through_teacher.flatten(1).norm(dim=1) > 1e-3).all(), f"{name} detaches its teacher in the attack"
    else:
        assert not through_teacher.any(), f"{name} differentiates through its teacher"
    assert (grad[:, :classes].flatten(1).norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("name", [n for n in NAMES if Shelf("methods").get(n).through_teacher])
def test_detaching_the_teacher_changes_the_attack_gradient(name: str) -> None:
    method, x, y = make(name), images().double(), labels()
    nets = Nets(frozen(SmallNet().double()), {"robust": frozen(SmallNet(seed=7).double())})

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = nets.robust(x.detach()) + 0 * x.sum()  # a slope there is, and it is nothing
            return logits

    grads = []
    for teacher in (nets.robust, Detached()):
        x_adv = (x + 0.01).requires_grad_(True)
        values = method.inner(Nets(nets.student, {"robust": teacher}), x, y)(x_adv)
        grads.append(torch.autograd.grad(values.sum(), x_adv)[0])
    assert (grads[0] - grads[1]).norm() > 1e-2 * grads[1].norm()


# --- the outer step


@taught
def test_teachers_stay_frozen_and_in_eval_mode(name: str) -> None:
    method, x, y = make(name), images(), labels()
    nets = nets_for(method)
    before = {role: copy.deepcopy(net.state_dict()) for role, net in nets.teachers.items()}
    loss, _ = step(method, nets, x, y, attack(method, nets, x, y))
    loss.backward()
    for role, net in nets.teachers.items():
        assert all(p.grad is None for p in net.parameters())
        assert net.modes and not any(net.modes), f"the {role} teacher ran in train mode"
        assert all(torch.equal(value, before[role][key]) for key, value in net.state_dict().items())


@taught
def test_outer_loss_builds_no_graph_in_the_teacher(name: str) -> None:
    """Even a teacher whose parameters want a gradient gets none: its outer terms are constants."""
    method, x, y = make(name), images(), labels()
    nets = nets_for(method)
    for net in nets.teachers.values():
        net.requires_grad_(True)
    loss, _ = step(method, nets, x, y, images(seed=5))
    loss.backward()
    assert all(p.grad is None for net in nets.teachers.values() for p in net.parameters())


def test_every_method_has_its_sequence_of_passes_here() -> None:
    assert sorted(PASSES) == NAMES


@every
def test_passes_run_in_the_papers_order(name: str) -> None:
    """Which kind has the last word in the running averages (methods.md, 1.4)."""
    method, x, y, x_adv = make(name), images(), labels(), images(seed=5)
    nets = nets_for(method)
    step(method, nets, x, y, x_adv)
    kinds = {"c": x, "a": x_adv, "m": x - (x_adv - x)}
    assert nets.student.modes == [True] * len(PASSES[name])
    assert all(torch.equal(seen, kinds[kind]) for seen, kind in zip(nets.student.seen, PASSES[name], strict=True))

    written_out = SmallNet().train()
    with torch.no_grad():
        for kind in PASSES[name]:
            written_out(kinds[kind])
    for key, value in written_out.named_buffers():
        assert torch.equal(dict(nets.student.named_buffers())[key], value), key


@every
def test_parameters_get_the_gradient_of_the_loss(name: str) -> None:
    method, x, y = make(name), images(), labels()
    nets = nets_for(method)
    loss, _ = step(method, nets, x, y, attack(method, nets, x, y))
    assert loss.dim() == 0 and loss.isfinite()
    gradient = parameter_gradient(loss, nets.student)
    assert gradient.isfinite().all() and gradient.norm() > 0


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, classes: int, dtype: torch.dtype) -> None:
    method = make(name, classes=classes)
    y = torch.arange(6) % classes
    logits = [1e4 * torch.randn(6, classes, generator=rng(i)) for i in range(4)]
    logits[2][0], logits[3][1] = 0.0, -1e4
    x = picture(logits[0], logits[2]).to(dtype).requires_grad_(True)
    x_adv = picture(logits[1], logits[3]).to(dtype).requires_grad_(True)
    nets = readers(classes)
    values = method.inner(nets, x.detach(), y)(x_adv)
    (grad,) = torch.autograd.grad(values.sum(), x_adv)
    assert values.isfinite().all() and grad.isfinite().all()
    loss, terms, _ = outer(method, nets, Batch(x, y, x_adv))
    grads = [g for g in torch.autograd.grad(loss, (x, x_adv), allow_unused=True) if g is not None]
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert all(term.isfinite() for term in terms.values())


@every
def test_half_precision_logits_are_computed_in_float32(name: str) -> None:
    """Under autocast the nets return bfloat16; losses on it would have three digits."""
    method = make(name)
    s, a, t, u = (torch.randn(6, 10, generator=rng(i)).bfloat16().float() for i in range(4))
    x, x_adv, y = picture(s, t).float(), picture(a, u).float(), labels()
    full, *_ = outer(method, readers(10), Batch(x, y, x_adv))
    half, *_ = outer(method, readers(10), Batch(x.bfloat16(), y, x_adv.bfloat16()))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=1e-5)


@every
def test_terms_are_detached_scalars(name: str) -> None:
    method, x, y = make(name), images(), labels()
    _, terms = step(method, nets_for(method), x, y, images(seed=5))
    assert terms
    for key, term in terms.items():
        assert term.dim() == 0 and not term.requires_grad and term.isfinite(), key


@every
def test_repeating_a_batch_leaves_the_loss_unchanged(name: str) -> None:
    """Every reduction is a mean over images (3.2 c): the learning rate must not depend on the batch size."""
    method, x, y, x_adv = make(name), images(), labels(), images(seed=5)
    nets = nets_for(method)
    nets.student.eval()
    once, *_ = outer(method, nets, Batch(x, y, x_adv))
    twice, *_ = outer(method, nets, Batch(x.repeat(2, 1, 1, 1), y.repeat(2), x_adv.repeat(2, 1, 1, 1)))
    assert twice.item() == pytest.approx(once.item(), rel=1e-5)
