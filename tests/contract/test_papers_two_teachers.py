"""What MTARD and B-MTARD say of themselves: the numbered tests of methods.md 5.1 and 5.2, and their parity over steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustkd.losses import entropy, kl
from robustkd.methods._balance import Balance
from robustkd.methods._base import Batch, Clock, Method, Nets
from robustkd.methods.b_mtard import Tempered
from tests.contract.test_methods import attack, parameter_gradient
from tests.nets import CLOCK, SmallNet, frozen, images, labels, make, outer, picture, readers
from tests.parity import equations_two_teachers as two
from tests.parity.equations import Case

BOTH = pytest.mark.parametrize("name", ["mtard", "b-mtard"])
positive = st.floats(1e-4, 1e4)


def two_teachers() -> Nets:
    return Nets(SmallNet().eval(), {"robust": frozen(SmallNet(seed=7)), "clean": frozen(SmallNet(seed=8))})


def seen(adv: float, nat: float, **more: float) -> dict[str, Tensor]:
    """Terms of a batch with these losses."""
    values = {"kl_adv": adv, "kl_clean": nat, "entropy_adv": 1.0, "entropy_nat": 1.0} | more
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def case(seed: int, *, rows: int = 6, classes: int = 10) -> Case:
    rng = np.random.default_rng(seed)
    s, a, t, u = (scale * rng.standard_normal((rows, classes)) for scale in (2.0, 2.0, 5.0, 1.5))
    return Case(s, a, t, u, rng.integers(classes, size=rows))


# --- both methods


@BOTH
@pytest.mark.parametrize("variant", ["fixed", "code"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_loss_gradient_and_state_over_three_steps(name: str, variant: str, scale: float) -> None:
    method = make(name, variant=variant, scale=scale)
    state, expected_state = method.init(), two.State()
    for seed, lr_scale in ((0, 1.0), (1, 1.0), (2, 0.1)):
        data = case(seed)
        x, x_adv = picture(data.s, data.t).requires_grad_(True), picture(data.a, data.u).requires_grad_(True)
        clock = replace(CLOCK, lr_scale=lr_scale)
        loss, _, state = outer(method, readers(10), Batch(x, torch.as_tensor(data.y), x_adv), state, clock)
        grad_x, grad_adv = torch.autograd.grad(loss, (x, x_adv))
        expected, expected_state = two.step(
            data,
            expected_state,
            tempered=name == "b-mtard",
            floor=1e-5 if variant == "code" else 0.0,
            scale=scale,
            eta=0.025 * lr_scale,
            mu=0.001 * lr_scale,
        )
        assert loss.item() == pytest.approx(expected.value, rel=1e-9)
        np.testing.assert_allclose(grad_x[:, :10, 0, 0], expected.grad_s, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(grad_adv[:, :10, 0, 0], expected.grad_a, rtol=1e-9, atol=1e-12)
        found = method.save(state)
        for field, value in vars(expected_state).items():
            assert (name == "mtard" and field.startswith("tau")) or found[field] == pytest.approx(value, rel=1e-9), field
    assert abs(state.w_adv - 0.5) > 1e-4, "the state has moved"


@BOTH
def test_each_teacher_sees_its_own_kind_of_image_and_takes_no_part_in_the_attack(name: str) -> None:
    nets, x, y = two_teachers(), images(), labels()
    x_adv = attack(make(name), nets, x, y)
    robust, clean = nets.teachers["robust"], nets.teachers["clean"]
    assert not robust.seen and not clean.seen
    outer(make(name), nets, Batch(x, y, x_adv))
    assert [torch.equal(seen, x_adv) for seen in robust.seen] == [True] and not torch.equal(x, x_adv)
    assert [torch.equal(seen, x) for seen in clean.seen] == [True]


@BOTH
def test_labels_choose_the_attack_and_nothing_else(name: str) -> None:
    nets, x, x_adv = two_teachers(), images(), images(seed=5)
    losses = [outer(make(name), nets, Batch(x, labels(seed=s), x_adv))[0] for s in (2, 3)]
    assert torch.equal(*losses)
    assert not torch.equal(*(attack(make(name), nets, x, labels(seed=s)) for s in (2, 3)))


@BOTH
def test_first_update_leaves_both_weights_one_half(name: str) -> None:
    method = make(name)
    after = method.advance(method.init(), seen(3.0, 0.2), CLOCK)
    assert (after.w_adv, after.w_nat) == (0.5, 0.5)
    assert (after.first_adv, after.first_nat) == (3.0, pytest.approx(0.2))


@BOTH
@given(losses=st.lists(st.tuples(positive, positive), min_size=1, max_size=12), eta=st.floats(0, 1))
def test_weights_sum_to_one_and_stay_between_zero_and_one(name: str, losses: list[tuple[float, float]], eta: float) -> None:
    method = make(name, eta=eta)
    state = method.init()
    for adv, nat in losses:
        state = method.advance(state, seen(adv, nat), CLOCK)
        assert 0 <= state.w_adv <= 1 and 0 <= state.w_nat <= 1
        assert state.w_adv + state.w_nat == pytest.approx(1, abs=1e-12)


@BOTH
def test_the_branch_that_has_fallen_less_gains_weight(name: str) -> None:
    method = make(name)
    state = method.advance(method.init(), seen(1.0, 1.0), CLOCK)
    assert method.advance(state, seen(0.9, 0.5), CLOCK).w_adv > 0.5
    assert method.advance(state, seen(0.5, 0.9), CLOCK).w_adv < 0.5


@BOTH
def test_constant_ratios_draw_the_weight_in_geometrically(name: str) -> None:
    """w_nat -> l_nat / (l_nat + l_adv), its distance shrinking by 1 - eta a step."""
    method = make(name)
    state = method.advance(method.init(), seen(2.0, 4.0), CLOCK)
    limit = 0.75 / (0.75 + 0.25)  # l_adv = 0.5 / 2, l_nat = 3 / 4
    distances = []
    for _ in range(400):
        state = method.advance(state, seen(0.5, 3.0), CLOCK)
        distances.append(limit - state.w_nat)
    assert distances[0] == pytest.approx(0.25 * 0.975, rel=1e-9)
    assert distances[-1] == pytest.approx(0.25 * 0.975**400, rel=1e-6)


def test_the_exponent_sharpens_the_ratio() -> None:
    after = {}
    for b in (0.0, 1.0, 3.0):
        method = make("mtard", b=b, eta=1.0)
        after[b] = method.advance(method.advance(method.init(), seen(1, 1), CLOCK), seen(0.5, 1.0), CLOCK).w_nat
    assert after == pytest.approx({0.0: 1 / 2, 1.0: 1 / 1.5, 3.0: 1 / 1.125})


@BOTH
def test_eta_and_mu_follow_the_learning_rate(name: str) -> None:
    method = make(name)
    first = method.advance(method.init(), seen(1, 1), CLOCK)
    whole, tenth = (
        method.advance(first, seen(1, 0.5, entropy_adv=2.0), Clock(epoch=0, epochs=1, step=1, lr_scale=scale))
        for scale in (1.0, 0.1)
    )
    assert tenth.w_nat - 0.5 == pytest.approx((whole.w_nat - 0.5) / 10)
    if name == "b-mtard":
        assert (whole.tau_nat, tenth.tau_nat) == pytest.approx((1.001, 1.0001))


@BOTH
def test_gradient_is_the_weighted_sum_and_passes_through_no_weight(name: str) -> None:
    nets, method = two_teachers(), make(name)
    batch = Batch(images(), labels(), images(seed=5))
    _, _, state = outer(method, nets, Batch(images(seed=3), labels(), images(seed=4)))
    loss, _, after = outer(method, nets, batch, state)
    assert after.w_adv != 0.5
    tau = (state.tau_adv, state.tau_nat) if name == "b-mtard" else (1.0, 1.0)
    adv = kl(nets.teachers["robust"](batch.x_adv) / tau[0], nets.student(batch.x_adv)).mean() / 10
    nat = kl(nets.teachers["clean"](batch.x) / tau[1], nets.student(batch.x)).mean() / 10
    g_adv, g_nat = parameter_gradient(adv, nets.student), parameter_gradient(nat, nets.student)
    expected = after.w_adv * g_adv + after.w_nat * g_nat
    assert torch.allclose(parameter_gradient(loss, nets.student), expected, rtol=1e-4, atol=1e-7)
    assert loss.item() == pytest.approx((after.w_adv * adv + after.w_nat * nat).item(), rel=1e-5)


@BOTH
@given(losses=st.lists(st.tuples(positive, positive), min_size=1, max_size=6), factor=st.floats(0.5, 1e3))
def test_scaling_one_loss_from_the_first_batch_on_changes_no_weight(
    name: str, losses: list[tuple[float, float]], factor: float
) -> None:
    method = make(name)
    plain, scaled = method.init(), method.init()
    for adv, nat in losses:
        plain = method.advance(plain, seen(adv, nat), CLOCK)
        scaled = method.advance(scaled, seen(factor * adv, nat), CLOCK)
        assert scaled.w_adv == pytest.approx(plain.w_adv, rel=1e-9)


@BOTH
def test_a_student_that_starts_as_a_copy_of_a_teacher_keeps_finite_weights(name: str) -> None:
    method = make(name)
    state = method.advance(method.init(), seen(-1e-9, 0.5), CLOCK)  # rounding can make an exact KL of zero negative
    after = method.advance(state, seen(0.0, 0.5), CLOCK)
    assert (after.w_adv, after.w_nat) == (0.5, 0.5)
    assert math.isfinite(method.advance(after, seen(5.0, 1e-30), CLOCK).w_adv)
    for scale in (1.0, 10.0):  # the least loss that counts is that of the released floor, which is scaled as well
        scaled = make(name, scale=scale)
        assert scaled.advance(scaled.init(), seen(0.0, 0.5), CLOCK).first_adv == pytest.approx(1e-5 * scale)


@BOTH
def test_a_loss_that_is_not_a_number_shows_in_what_is_differentiated(name: str) -> None:
    """The loop looks at the scalar: it must not be clipped into a number by the balance."""
    method = make(name)
    state = method.advance(method.init(), seen(math.nan, 1.0), CLOCK)
    assert math.isnan(state.w_adv) and math.isnan(state.w_nat)
    assert math.isnan(float(method.weigh(torch.tensor([math.nan, 1.0]), state)))


@BOTH
def test_add_on_weights_reach_the_adversarial_teacher_term_only(name: str) -> None:
    nets, x, y, x_adv = two_teachers(), images(), labels(), images(seed=5)
    _, plain, _ = outer(make(name), nets, Batch(x, y, x_adv))
    _, doubled, _ = outer(make(name), nets, Batch(x, y, x_adv, weights=torch.full((len(x),), 2.0)))
    assert doubled["kl_adv"].item() == pytest.approx(2 * plain["kl_adv"].item())
    assert doubled["kl_clean"].item() == plain["kl_clean"].item()


def test_the_two_methods_agree_while_temperatures_are_one() -> None:
    batch = Batch(images(), labels(), images(seed=5))
    ours, theirs = (outer(make(name, **knobs), two_teachers(), batch)[0] for name, knobs in (("mtard", {}), ("b-mtard", {})))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


# --- B-MTARD's temperatures


def tempered(state: Tempered, **entropies: float) -> Tempered:
    method: Method[Any, Tempered] = make("b-mtard")
    return method.advance(state, seen(1.0, 1.0, **entropies), CLOCK)


def test_temperatures_bring_a_flat_and_a_sharp_teacher_to_the_same_entropy() -> None:
    """Logits of SD 1.5 and 6: entropies first cross after some 2500 steps, tau_nat settles at 4, tau_adv stays at 1."""
    method: Method[Any, Tempered] = make("b-mtard")
    generator, state = torch.Generator().manual_seed(0), Tempered()
    gaps, y = [], torch.zeros(128, dtype=torch.long)
    for _ in range(3400):
        flat, sharp = (sd * torch.randn(128, 10, generator=generator) for sd in (1.5, 6.0))
        blank = torch.zeros(128, 10)
        x, x_adv = (torch.cat([blank, z], dim=1)[:, :, None, None] for z in (sharp, flat))
        _, found, state = outer(method, readers(10), Batch(x, y, x_adv), state)
        gaps.append((found["entropy_adv"] - found["entropy_nat"]).item())
    averages = [sum(gaps[i : i + 200]) / 200 for i in range(0, 3400, 200)]
    assert averages[:13] == sorted(averages[:13], reverse=True), averages
    assert 2000 < next(i for i, gap in enumerate(gaps) if gap <= 0) < 3000
    assert abs(averages[-1]) < 0.02 < averages[0]
    assert state.tau_nat == pytest.approx(4, abs=0.15) and 1 <= state.tau_adv <= 1.02


def test_equal_entropies_move_nothing() -> None:
    state = Tempered(tau_adv=2.0, tau_nat=3.0)
    after = tempered(state, entropy_adv=1.25, entropy_nat=1.25)
    assert (after.tau_adv, after.tau_nat) == (2.0, 3.0)


@given(pairs=st.lists(st.tuples(st.floats(0, 2.3), st.floats(0, 2.3)), min_size=1, max_size=30))
def test_temperatures_stay_in_range_and_move_apart_by_equal_steps(pairs: list[tuple[float, float]]) -> None:
    for start in (Tempered(), Tempered(tau_adv=10.0, tau_nat=10.0), Tempered(tau_adv=5.0, tau_nat=3.0)):
        state = start
        for adv, nat in pairs:
            after = tempered(state, entropy_adv=adv, entropy_nat=nat)
            assert 1 <= after.tau_adv <= 10 and 1 <= after.tau_nat <= 10
            if start.tau_adv == 5.0:  # neither clip can be reached in 30 steps
                assert after.tau_adv + after.tau_nat == pytest.approx(8.0, abs=1e-12)
                assert after.tau_adv - state.tau_adv == pytest.approx(-0.001 * np.sign(adv - nat), abs=1e-12)
            state = after


@pytest.mark.parametrize("tau", [10.0, 9.9995])
def test_the_clip_is_at_ten_and_at_one(tau: float) -> None:
    after = tempered(Tempered(tau_adv=1.0005, tau_nat=tau), entropy_adv=2.0, entropy_nat=0.1)
    assert (after.tau_adv, after.tau_nat) == (1.0, 10.0)


def test_as_coded_the_floor_enters_the_entropies_and_the_signs_are_those_of_ratios() -> None:
    """A certain teacher has the entropy -log(1 + 1e-5); against a negative one both ratios are below 1 and both rise."""
    sure, flat = torch.zeros(6, 10), torch.zeros(6, 10)
    sure[:, 3] = 100.0
    batch = Batch(picture(flat, sure), labels(), picture(flat, flat))
    method, start = make("b-mtard", variant="code"), Tempered(tau_adv=2.0, tau_nat=2.0)
    _, found, after = outer(method, readers(10), batch, start)
    assert found["entropy_nat"].item() == pytest.approx(-math.log1p(1e-5), rel=1e-6)
    assert found["entropy_adv"].item() == pytest.approx(-math.log(0.1 + 1e-5), rel=1e-9)
    assert (after.tau_adv, after.tau_nat) == pytest.approx((2.001, 2.001))
    _, _, after = outer(make("b-mtard"), readers(10), batch, start)
    assert (after.tau_adv, after.tau_nat) == pytest.approx((1.999, 2.001))


def test_the_sharper_teacher_gets_the_higher_temperature() -> None:
    after = tempered(Tempered(tau_adv=2.0, tau_nat=2.0), entropy_adv=2.0, entropy_nat=0.1)
    assert (after.tau_adv, after.tau_nat) == pytest.approx((1.999, 2.001))


def test_a_teacher_of_no_entropy_divides_nothing_by_zero() -> None:
    after = tempered(Tempered(tau_adv=2.0, tau_nat=2.0), entropy_adv=0.5, entropy_nat=0.0)
    assert (after.tau_adv, after.tau_nat) == pytest.approx((1.999, 2.001))
    method = make("b-mtard", variant="code")
    assert method.advance(Tempered(), seen(1, 1, entropy_adv=0.5, entropy_nat=0.0), CLOCK).tau_nat == pytest.approx(1.001)


def test_new_temperatures_take_effect_in_the_next_step_and_new_weights_in_this_one() -> None:
    s, a, t, u = (
        k * torch.randn(6, 5, generator=torch.Generator().manual_seed(i)).double() for i, k in enumerate((1, 1, 6, 1))
    )
    batch = Batch(picture(s, t), labels(classes=5), picture(a, u))
    before = Tempered(tau_adv=2.0, tau_nat=3.0, first_adv=1.0, first_nat=0.01)
    loss, found, after = outer(make("b-mtard", classes=5), readers(5), batch, before)
    assert after.tau_nat != before.tau_nat and after.w_adv != before.w_adv
    adv, nat = kl(u / 2.0, a).mean() / 5, kl(t / 3.0, s).mean() / 5  # old temperatures; the student stays at 1; no tau^2
    assert (found["kl_adv"].item(), found["kl_clean"].item()) == pytest.approx((adv.item(), nat.item()), rel=1e-12)
    assert found["entropy_adv"].item() == pytest.approx(entropy(u / 2.0).mean().item(), rel=1e-12)
    assert found["entropy_nat"].item() == pytest.approx(entropy(t / 3.0).mean().item(), rel=1e-12)
    assert loss.item() == pytest.approx((after.w_adv * adv + after.w_nat * nat).item(), rel=1e-12)


def test_temperature_leaves_the_students_distribution_alone() -> None:
    """The gradient in the student's logits is pS - p(T/tau) at any tau: nothing on the student's side depends on it."""
    s, t = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0)).double()
    for tau in (1.0, 4.0):
        x_adv = picture(s, t).requires_grad_(True)
        state = Tempered(tau_adv=tau, tau_nat=tau)
        loss, _, after = outer(make("b-mtard"), readers(10), Batch(picture(s, t), labels(), x_adv), state)
        (grad,) = torch.autograd.grad(loss, x_adv)
        expected = after.w_adv * (s.softmax(1) - (t / tau).softmax(1)) / 60
        assert torch.allclose(grad[:, :10, 0, 0], expected, rtol=1e-9, atol=1e-12)


@BOTH
def test_a_restored_state_takes_the_same_next_step(name: str) -> None:
    method, nets = make(name), two_teachers()
    state = None
    for seed in range(3):
        *_, state = outer(method, nets, Batch(images(seed=seed), labels(), images(seed=seed + 10)), state)
    restored = make(name).restore(json.loads(json.dumps(method.save(state))))
    assert restored == state and type(restored) is type(state) and isinstance(restored, Balance)
    batch = Batch(images(seed=20), labels(), images(seed=21))
    whole, resumed = (outer(method, nets, batch, each) for each in (state, restored))
    assert torch.equal(whole[0], resumed[0]) and whole[2] == resumed[2]


@BOTH
def test_the_log_shows_weights_and_temperatures(name: str) -> None:
    method = make(name)
    shown = method.gauges(method.init())
    assert shown == {"w_adv": 0.5, "w_nat": 0.5} | ({"tau_adv": 1.0, "tau_nat": 1.0} if name == "b-mtard" else {})
