"""Add-ons by themselves: what AWP, IGDM, SAAD's weights and averages compute, around any method of the shelf."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkd.catalog import Shelf
from robustkd.methods._base import Batch, Clock, Method, Nets
from robustkd.methods._guidance import excess_entropy, mirrored, ramp
from robustkd.methods._memo import Memo, remembering
from robustkd.recipe.addons import AddonsConfig, AverageConfig
from robustkd.training.addons import Addons
from robustkd.training.average import average_of
from robustkd.training.awp import Awp, eligible
from robustkd.training.guidance import Igdm
from robustkd.training.team import Team, join
from tests.nets import CLOCK, SmallNet, frozen, images, labels, make, picture, readers
from tests.parity.equations import kl_row

#: those a recipe may add IGDM and the weights to
FREE = [
    name
    for name in Shelf("methods").names()
    if (method := Shelf("methods").get(name)).adversarial and "robust" in method.roles and not method.includes
]
ALL = Shelf("methods").names()


@pytest.fixture(scope="module")
def team() -> Team:
    return join("cpu")


def nets_for(method: Method[Any, Any]) -> Nets:
    roles = type(method).roles
    return Nets(SmallNet().train(), {role: frozen(SmallNet(seed=7 + i)) for i, role in enumerate(roles)})


def attacked(seed: int = 1) -> Batch:
    """A batch whose x' lies 8/255 from x."""
    x = images(seed=seed)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 100))
    return Batch(x, labels(seed=seed), (x + 8 / 255 * (2 * noise - 1).sign()).clamp(0, 1))


def added(method: Method[Any, Any], nets: Nets, team: Team, **config: Any) -> Addons:
    return Addons(AddonsConfig.model_validate(config), method, nets.student, team=team, steps=2, autocast=nullcontext)


def train(addons: Addons, nets: Nets, *, steps: int, lr: float = 0.1) -> Any:
    """Some steps as the loop takes them; the method's state after them."""
    method, state = addons.method, addons.method.init()
    optimizer = torch.optim.SGD(nets.student.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        clock = Clock(epoch=step // 2, epochs=steps, step=step)
        with addons.around(nets, attacked(step), state, clock) as (inside, batch, _):
            parts, terms = addons.outer.loss(inside, batch, state, clock)
            state = method.advance(state, {"loss": parts.detach(), **terms}, clock)
            optimizer.zero_grad()
            addons.outer.weigh(parts, state).backward()
            optimizer.step()
    return state


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- none


@pytest.mark.parametrize("name", ALL)
def test_without_add_ons_the_method_itself_is_called(name: str, team: Team) -> None:
    method = make(name)
    nets, batch = nets_for(method), attacked()
    addons = added(method, nets, team)
    assert addons.outer is method and addons.outcome is nets.student
    with addons.around(nets, batch, method.init(), CLOCK) as (inside, given, seen):
        assert inside is nets and given is batch and seen == {}


@pytest.mark.parametrize("name", ALL)
def test_advancing_leaves_the_state_it_started_from_alone(name: str) -> None:
    """AWP advances a state it then forgets."""
    method = make(name)
    state = method.init()
    before = copy.deepcopy(state)
    parts, terms = method.loss(nets_for(method), attacked(), state, CLOCK)
    method.advance(state, {"loss": parts.detach(), **terms}, CLOCK)
    assert state == before


# --- AWP (methods.md 3.4)


def host_loss(name: str, nets: Nets, batch: Batch, student: nn.Module) -> Tensor:
    method = make(name)
    parts, terms = method.loss(Nets(student, nets.teachers), batch, method.init(), CLOCK)
    return method.weigh(parts, method.advance(method.init(), {"loss": parts.detach(), **terms}, CLOCK))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gamma", [0.005, 0.01])
def test_awp_moves_each_weight_by_gamma_and_back_again(name: str, gamma: float, team: Team) -> None:
    nets, batch = nets_for(make(name)), attacked()
    before = weights_of(nets.student)
    moved = {"conv.weight", "linear.weight"}
    with Awp(nets.student, gamma=gamma, team=team).shifted(lambda proxy: host_loss(name, nets, batch, proxy)) as terms:
        shifted = weights_of(nets.student)
        for key, value in before.items():
            distance = (shifted[key].double() - value.double()).norm()
            if key in moved:
                assert (distance / value.norm()).item() == pytest.approx(gamma, rel=1e-4), key
            else:  # (d): the proxy's passes leave the running statistics as they are, to the bit
                assert torch.equal(shifted[key], value), key
        whole = torch.stack([before[key].norm() for key in sorted(moved)]).norm()
        assert terms["awp_shift"].item() == pytest.approx(gamma * whole.item(), rel=1e-4)
    for key, value in nets.student.state_dict().items():
        assert (value - before[key]).double().norm() <= 1e-6 * before[key].double().norm(), key
    assert all(p.grad is None for p in nets.student.parameters())


@pytest.mark.parametrize("name", ALL)
def test_awp_goes_uphill(name: str, team: Team) -> None:
    rises = []
    for seed in range(5):
        nets, batch = nets_for(make(name)), attacked(seed)

        def loss(student: nn.Module, nets: Nets = nets, batch: Batch = batch) -> Tensor:
            return host_loss(name, nets, batch, student)

        at_rest = loss(copy.deepcopy(nets.student)).item()
        with Awp(nets.student, gamma=0.005, team=team).shifted(loss):
            rises.append(loss(copy.deepcopy(nets.student)).item() - at_rest)
    assert np.mean(rises) > 0


def test_awp_moves_no_bias_and_no_batch_norm() -> None:
    assert [tuple(p.shape) for p in eligible(SmallNet())] == [(6, 3, 3, 3), (10, 6)]


def test_awp_of_a_loss_without_a_slope_moves_nothing(team: Team) -> None:
    net = SmallNet()
    before = weights_of(net)
    with Awp(net, gamma=0.01, team=team).shifted(lambda proxy: 0 * proxy(images()).sum()):
        assert same(weights_of(net), before)


@pytest.mark.parametrize("name", ALL)
def test_awp_with_gamma_zero_is_no_awp_and_advances_the_state_once_a_step(name: str, team: Team) -> None:
    """Weights, running statistics and the method's own state, over steps in which that state moves."""
    results = []
    for config in ({}, {"awp": {"gamma": 0.0}}):
        method = make(name)
        nets = nets_for(method)
        state = train(added(method, nets, team, **config), nets, steps=4)
        results.append((weights_of(nets.student), state))
    (plain, state), (zero, other) = results
    assert all(torch.allclose(plain[key], zero[key], rtol=1e-6, atol=1e-7) for key in plain) and state == other


def test_awp_changes_the_weights_from_its_epoch_on_and_not_before(team: Team) -> None:
    ends = []
    for config in ({}, {"awp": {"gamma": 0.05, "start_epoch": 1}}):
        method = make("pgd-at")
        nets = nets_for(method)
        addons = added(method, nets, team, **config)
        train(addons, nets, steps=2)
        early = weights_of(nets.student)
        train(addons, nets, steps=4)
        ends.append((early, weights_of(nets.student)))
    assert same(ends[0][0], ends[1][0]) and not same(ends[0][1], ends[1][1])


def test_awp_shift_is_undone_when_the_step_fails(team: Team) -> None:
    method = make("pgd-at")
    nets = nets_for(method)
    before = weights_of(nets.student)
    addons = added(method, nets, team, awp={"gamma": 0.1}, average={"name": "ema"})
    with pytest.raises(ZeroDivisionError), addons.around(nets, attacked(), None, CLOCK):
        raise ZeroDivisionError
    assert all(torch.allclose(v, before[k], rtol=1e-6) for k, v in nets.student.state_dict().items())
    assert addons.outcome is nets.student, "a step that failed is not averaged"


# --- IGDM (methods.md 6.1)


def extra(x: Tensor, x_adv: Tensor, *, classes: int = 10, alpha: float = 1.0, clock: Clock = CLOCK) -> tuple[Tensor, Tensor]:
    """IGDM's share of the loss around AdaAD, and the logged term, on logits written in the image."""
    host = make("adaad", classes=classes)
    batch, nets = Batch(x, labels(len(x), classes=classes), x_adv), readers(classes)
    igdm = Igdm(host, alpha=alpha)
    parts, terms = igdm.loss(nets, batch, None, clock)
    return igdm.weigh(parts, None) - host.loss(nets, batch, None, clock)[0], terms["igdm"]


def logits(seed: int, rows: int = 6, classes: int = 10) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_igdm_vanishes_where_student_and_teacher_differ_by_a_constant() -> None:
    t, u = logits(0), logits(1)
    share, term = extra(picture(t + 3, t), picture(u + 3, u))
    assert abs(share.item()) < 1e-14 and abs(term.item()) < 1e-14


def test_igdm_vanishes_without_a_perturbation() -> None:
    x = picture(logits(0), logits(1))
    share, term = extra(x, x.clone())
    assert share.item() == term.item() == 0


@pytest.mark.parametrize(("epoch", "share_of_alpha"), [(0, 1 / 200), (99, 0.5), (199, 1.0)])
def test_igdm_counts_epochs_from_one(epoch: int, share_of_alpha: float) -> None:
    x, x_adv = picture(logits(0), logits(1)), picture(logits(2), logits(3))
    share, term = extra(x, x_adv, alpha=10.0, clock=Clock(epoch=epoch, epochs=200, step=0))
    assert ramp(10.0, Clock(epoch, 200, 0)) == pytest.approx(10 * share_of_alpha)
    assert share.item() == pytest.approx(10 * share_of_alpha * term.item(), rel=1e-12)


def test_igdm_equals_its_equation_in_value_and_gradient() -> None:
    """On logits s, a, t, u of S and T at x and x', linear in the image: dT = 2 (u - t), dS = 2 (a - s)."""
    s, a, t, u = (logits(i, rows=5) for i in range(4))
    x, x_adv = picture(s, t).requires_grad_(True), picture(a, u).requires_grad_(True)
    share, term = extra(x, x_adv)
    clean, adversarial = torch.autograd.grad(share, (x, x_adv))
    rows = [kl_row(2 * (u - t)[i].numpy(), 2 * (a - s)[i].numpy()) for i in range(5)]
    gradient = 2 * np.stack([grad for _, _, grad in rows]) / 5
    assert term.item() == pytest.approx(sum(value for value, _, _ in rows) / 5, rel=1e-10)
    np.testing.assert_allclose(adversarial[:, :10, 0, 0], gradient, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(clean[:, :10, 0, 0], -gradient, rtol=1e-8, atol=1e-12)
    assert not clean[:, 10:].any() and not adversarial[:, 10:].any(), "a gradient reaches the teacher"


@pytest.mark.parametrize("name", FREE)
def test_igdm_adds_one_pass_on_the_mirrored_image_behind_the_methods_own(name: str) -> None:
    method, batch = make(name), attacked()
    alone, nets = nets_for(method), nets_for(method)
    for net in nets.teachers.values():
        net.requires_grad_(True)
    host, host_terms = method.loss(alone, batch, method.init(), CLOCK)
    igdm = Igdm(method, alpha=1.0)
    parts, terms = igdm.loss(nets, batch, method.init(), CLOCK)
    state = method.advance(method.init(), {"loss": host.detach(), **host_terms}, CLOCK)
    igdm.weigh(parts, state).backward()
    assert len(nets.student.seen) == len(alone.student.seen) + 1
    last = nets.student.seen[-1]
    assert torch.equal(last, batch.x - (batch.x_adv - batch.x)) and (last.min() < 0 or last.max() > 1), "x - d is clamped"
    assert nets.student.modes == [True] * len(nets.student.seen)
    assert all(p.grad is None for net in nets.teachers.values() for p in net.parameters())
    expected = method.weigh(host, state) + terms["igdm"]
    assert igdm.weigh(parts, state).item() == pytest.approx(expected.item(), rel=1e-6)
    assert {key: value.item() for key, value in host_terms.items()}.items() <= {k: v.item() for k, v in terms.items()}.items()


def test_igdm_makes_the_pass_on_the_adversarial_images_where_the_method_makes_none() -> None:
    class Blind(type(make("rslad"))):  # type: ignore[misc]
        def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> Any:
            return nets.student(batch.x).square().mean(), {}

    nets, batch = nets_for(make("rslad")), attacked()
    parts, terms = Igdm(Blind(make("rslad").config, classes=10), alpha=1.0).loss(nets, batch, None, CLOCK)
    assert len(nets.student.seen) == 3 and terms["igdm"] > 0 and parts.isfinite().all()


# --- SAAD's weights (methods.md 6.2)


def test_weights_start_at_zero_and_follow_the_entropy() -> None:
    found = excess_entropy(torch.tensor([[0.0, 0.0], [9.0, 0.0], [2.0, 0.0]]), scale=5.0)
    assert found[1] == 0 and (found >= 0).all() and found[0] > found[2] > 0
    assert found[0].item() == pytest.approx(5 * (np.log(2) - 0.0012339), rel=1e-4)
    part = excess_entropy(torch.zeros(2, 2), scale=5.0, lowest=torch.tensor(0.0))
    assert part.tolist() == pytest.approx([5 * np.log(2)] * 2), "the smallest may be another process's"


@pytest.mark.parametrize("name", FREE)
def test_weights_reach_every_methods_teacher_term(name: str, team: Team) -> None:
    method = make(name)
    nets = nets_for(method)
    batch = attacked()
    batch = Batch(batch.x, nets.robust(batch.x).argmax(1), batch.x_adv)
    losses = []
    for weights in (None, torch.ones(6), torch.full((6,), 2.0)):
        parts, _ = method.loss(nets, Batch(batch.x, batch.y, batch.x_adv, weights), method.init(), CLOCK)
        losses.append(method.weigh(parts, method.init()).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] - losses[0] > 1e-3 * abs(losses[0]), f"{name} does not apply batch.weighted"


def test_weights_are_those_of_the_teacher_under_attack_and_multiply_igdm_too(team: Team) -> None:
    method, batch = make("rslad"), attacked()
    nets = nets_for(method)
    addons = added(method, nets, team, entropy_weights={}, igdm={"alpha": 1.0})
    with addons.around(nets, batch, None, CLOCK) as (inside, weighted, seen):
        _, terms = addons.outer.loss(inside, weighted, None, CLOCK)
    expected = excess_entropy(nets.robust(batch.x_adv), scale=5.0)
    assert weighted.weights is not None and torch.allclose(weighted.weights, expected)
    assert seen["weight_mean"].item() == pytest.approx(expected.mean().item())
    away = mirrored(batch)
    teacher = nets.robust(batch.x_adv) - nets.robust(away)
    student = nets.student(batch.x_adv) - nets.student(away)
    gap = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    assert terms["igdm"].item() == pytest.approx((expected * gap).mean().item(), rel=1e-4)


def test_a_teacher_runs_once_on_each_kind_of_image_however_many_add_ons_ask(team: Team) -> None:
    method = make("adaad")
    nets = nets_for(method)
    addons = added(method, nets, team, awp={}, entropy_weights={}, igdm={})
    shared = remembering(nets.student, nets.teachers)
    with addons.around(shared, attacked(), None, CLOCK) as (inside, batch, _):
        addons.outer.loss(inside, batch, None, CLOCK)
    seen = nets.robust.seen
    assert len(seen) == 4, "x, x', and x - d once for the proxy and once for the step"
    assert not any(nets.robust.modes)


def test_a_remembering_teacher_still_lets_a_gradient_through() -> None:
    teacher = frozen(SmallNet())
    memo, x = Memo(teacher), images().requires_grad_(True)
    memo(x.detach())
    (grad,) = torch.autograd.grad(memo(x).sum(), x)
    assert grad.any()


# --- averages


def averaged(name: str, **knobs: Any) -> tuple[Any, SmallNet]:
    net = SmallNet().train()
    return average_of(AverageConfig(name=name, **knobs), net, steps=2), net


def walk(average: Any, net: SmallNet, steps: int) -> list[dict[str, Tensor]]:
    """Move weights and statistics, two steps an epoch; the state after each step."""
    states = []
    for step in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
            net(images(seed=step))
        average.after_step(Clock(epoch=step // 2, epochs=9, step=step))
        states.append(weights_of(net))
    return states


def test_ema_with_decay_zero_is_the_student_itself() -> None:
    average, net = averaged("ema", decay=0.0)
    walk(average, net, 5)
    assert same(weights_of(average.net), weights_of(net))


def test_ema_is_the_weighted_sum_of_all_weights_and_statistics() -> None:
    average, net = averaged("ema", decay=0.75)
    first, *rest = walk(average, net, 6)
    for key, value in first.items():
        expected = value
        for state in rest:
            expected = 0.75 * expected + 0.25 * state[key] if value.is_floating_point() else state[key]
        assert torch.allclose(weights_of(average.net)[key], expected, rtol=1e-5, atol=1e-6), key


def test_swa_is_the_mean_of_the_weights_at_the_end_of_each_epoch_from_its_start() -> None:
    average, net = averaged("swa", start_epoch=1)
    states = walk(average, net, 8)
    assert average.taken == 3
    for key, _ in net.named_parameters():
        expected = torch.stack([states[step][key] for step in (3, 5, 7)]).mean(0)
        assert torch.allclose(weights_of(average.net)[key], expected, rtol=1e-5, atol=1e-6), key


def test_swa_measures_its_statistics_on_the_images_it_is_given() -> None:
    average, net = averaged("swa")
    walk(average, net, 4)
    student = weights_of(net)
    batches = [images(seed=s) for s in (20, 21, 22)]
    average.settle(iter(batches))
    with torch.no_grad():
        features = [average.net.conv(x) for x in batches]
    mean = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    variance = torch.stack([f.transpose(0, 1).flatten(1).var(1) for f in features]).mean(0)
    assert torch.allclose(average.net.norm.running_mean, mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(average.net.norm.running_var, variance, rtol=1e-4, atol=1e-6)
    assert average.net.norm.momentum == 0.1
    assert same(weights_of(net), student), "the student's own statistics moved"


def test_before_its_first_epoch_an_average_is_the_student(team: Team) -> None:
    method = make("pgd-at")
    nets = nets_for(method)
    addons = added(method, nets, team, average={"name": "swa", "start_epoch": 1})
    addons.settle(iter([images()]))
    assert addons.outcome is nets.student
    train(addons, nets, steps=4)
    assert addons.outcome is not nets.student and addons.average is not None and addons.average.taken == 1
    assert same(
        {k: v for k, v in weights_of(addons.outcome).items() if "weight" in k},
        {k: v for k, v in weights_of(nets.student).items() if "weight" in k},
    )
