"""What the papers of MART, ARD, IAD, AKD and KD say of them: the numbered tests of the specification, and bad knobs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustkd.errors import ConfigError
from robustkd.losses import cross_entropy, kl
from robustkd.methods._base import Batch, Clock, Nets
from robustkd.methods.iad import trust
from robustkd.methods.mart import rival
from robustkd.recipe.reading import Source, validate
from robustkd.recipe.schema import Recipe
from tests.contract.test_methods import THREAT, attack, parameter_gradient, rng
from tests.nets import CLOCK, Reader, SmallNet, frozen, images, labels, make, picture, readers
from tests.parity import equations_one_teacher as one
from tests.parity.test_methods import CASES, close

LATE = Clock(epoch=100, epochs=200, step=0)


def pair() -> Nets:
    return Nets(SmallNet().eval(), {"robust": frozen(SmallNet(seed=7)), "clean": frozen(SmallNet(seed=8))})


def logits(seed: int, rows: int = 6, classes: int = 10) -> Tensor:
    return torch.randn(rows, classes, generator=rng(seed), dtype=torch.float64)


def read_batch(s: Tensor, a: Tensor, t: Tensor, u: Tensor, y: Tensor, weights: Tensor | None = None) -> Batch:
    """Images on which the readers give these logits, wanting a gradient."""
    return Batch(picture(s, t).requires_grad_(True), y, picture(a, u).requires_grad_(True), weights)


def loss_of(name: str, batch: Batch, clock: Clock = CLOCK, **knobs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return make(name, **knobs).loss(readers(10), batch, None, clock)


def certain(y: Tensor, by: float = 60.0) -> Tensor:
    """Logits whose softmax is 1 at the label, to float64."""
    return by * torch.nn.functional.one_hot(y, 10).double()


# --- MART


def test_mart_leaves_certain_images_alone() -> None:
    """(a) p_y = 1: what is left of the KL term is the 1e-7 of its weight."""
    y, a = labels(), logits(1)
    _, terms = loss_of("mart", read_batch(certain(y), a, a, a, y))
    plain = kl(certain(y), a).mean().item()
    assert plain > 1
    assert abs(terms["kl"].item()) <= 1.001e-7 * plain


def test_mart_rival_is_the_strongest_of_the_other_classes() -> None:
    """(b) never the label, whether it is the argmax or not; also where probabilities are all 0 but one."""
    many, y = torch.randn(300, 7, generator=rng()), labels(300, classes=7)
    first = many.argmax(1)
    found = rival(many, y)
    assert (first == y).any() and (found != y).all()
    assert torch.equal(found[first != y], first[first != y])
    runner_up = many.argsort(1, descending=True)[:, 1]
    assert torch.equal(found[first == y], runner_up[first == y])
    assert rival(torch.tensor([[900.0, -300, -200]]), torch.tensor([0])).item() == 2
    assert rival(torch.tensor([[1.0, 1, 0], [1, 1, 0]]), torch.tensor([0, 1])).tolist() == [1, 0]
    assert rival(torch.tensor([[3.0, 1]]), torch.tensor([0])).item() == 1


def test_mart_boost_is_bounded_below_and_follows_the_rival() -> None:
    """(c) BCE_i >= CE_i - log 1.0001, per image; the boost is that of the strongest wrong class."""
    y, s, a = labels(40), logits(0, 40), 3 * logits(1, 40)
    a[:3] = certain(y[:3])
    for i in range(len(y)):
        row = read_batch(s[i : i + 1], a[i : i + 1], s[i : i + 1], a[i : i + 1], y[i : i + 1])
        bce = loss_of("mart", row)[1]["bce"].item()
        ce = cross_entropy(a[i : i + 1], y[i : i + 1]).item()
        others = a[i].softmax(0).clone()
        others[y[i]] = 0
        assert bce >= ce - np.log(1.0001) - 1e-12
        assert bce == pytest.approx(ce - np.log(1.0001 - others.max().item() + 1e-12), rel=1e-12)


def test_mart_weight_and_reference_get_their_gradient() -> None:
    """(d) with the label term taken away, no detached version has the same gradient on clean images."""
    y, s, a = labels(), logits(0), logits(1)
    batch = read_batch(s, a, s, a, y)
    loss = loss_of("mart", batch, beta=6)[0] - loss_of("mart", batch, beta=0)[0]
    ours = torch.autograd.grad(loss, batch.x)[0][:, :10, 0, 0] / 6

    def clean_gradient(*, live_weight: bool, live_reference: bool) -> Tensor:
        z = s.clone().requires_grad_(True)
        fixed = z.detach()
        p_y = (z if live_weight else fixed).softmax(1).gather(1, y[:, None]).squeeze(1)
        return torch.autograd.grad((kl(z if live_reference else fixed, a) * (1 - p_y)).mean(), z)[0]

    assert torch.allclose(ours, clean_gradient(live_weight=True, live_reference=True), atol=1e-6)
    for weight, reference in ((False, True), (True, False)):
        detached = clean_gradient(live_weight=weight, live_reference=reference)
        assert (ours - detached).norm() > 0.1 * ours.norm()


# --- ARD


@pytest.mark.parametrize(("where", "seen"), [("clean", "x"), ("adversarial", "x_adv")])
def test_ard_teacher_looks_where_it_is_told(where: str, seen: str) -> None:
    """(a) at x and never at x', unless a port is asked for; it takes no part in the attack."""
    nets, x, y = pair(), images(), labels()
    method = make("ard", teacher_input=where)
    x_adv = attack(method, nets, x, y)
    assert not nets.robust.seen
    method.loss(nets, Batch(x, y, x_adv), None, CLOCK)
    (looked,) = nets.robust.seen
    assert torch.equal(looked, {"x": x, "x_adv": x_adv}[seen]) and not torch.equal(x, x_adv)


def test_ard_of_a_student_equal_to_its_teacher_is_zero() -> None:
    """(b) on the teacher's logits at x, whatever it says at x'."""
    s, t = logits(0), logits(1)
    assert loss_of("ard", read_batch(s, t, t, logits(2), labels()))[0].item() == pytest.approx(0, abs=1e-12)


def test_ard_matches_logits_at_a_high_temperature() -> None:
    """(c) at tau 1000 the gradient is that of mean-removed logit matching, over B C."""
    t, a = 3 * logits(0), 3 * logits(1)
    batch = read_batch(logits(2), a, t, logits(3), labels())
    loss, _ = loss_of("ard", batch, tau=1000, reduction="bmean")
    grad = torch.autograd.grad(loss, batch.x_adv)[0][:, :10, 0, 0]
    apart = a - t
    limit = (apart - apart.mean(1, keepdim=True)) / (6 * 10)
    assert torch.cosine_similarity(grad, limit, dim=1).min() > 0.999
    assert (grad - limit).norm() < 0.01 * limit.norm()


def test_ard_ignores_a_constant_in_the_teachers_logits() -> None:
    """(d)."""
    s, a, t, y = logits(0), logits(1), logits(2), labels()
    before, after = (loss_of("ard", read_batch(s, a, t + shift, t, y))[0].item() for shift in (0.0, 57.0))
    assert after == pytest.approx(before, rel=1e-9)


def test_ard_temperature_and_reduction_have_the_factor_of_the_paper() -> None:
    """900 / 10 on bmean at the default temperature of 30 and ten classes."""
    s, a, t, y = logits(0), logits(1), logits(2), labels()
    loss, _ = loss_of("ard", read_batch(s, a, t, t, y))
    assert loss.item() == pytest.approx(90 * kl(t / 30, a / 30).mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["ard", "iad"])
def test_attack_is_that_of_the_student_in_train_mode_from_a_uniform_start(name: str) -> None:
    method, nets, x = make(name), pair(), images()
    assert (method.attack_mode, method.start) == ("train", "uniform")
    tracked = int(nets.student.norm.num_batches_tracked)
    attack(method, nets, x, labels(), steps=4)
    assert int(nets.student.norm.num_batches_tracked) == tracked + 4
    assert nets.student.modes[-4:] == [True] * 4
    first = nets.student.seen[-4] - x
    assert 0.9 * THREAT.eps < first.abs().max() <= THREAT.eps + 1e-6, "the first forward pass sees the start"


@pytest.mark.parametrize("name", ["ard", "iad", "akd"])
def test_weightless_clean_pass_can_be_left_out_and_only_moves_statistics(name: str) -> None:
    losses, tracked = [], []
    for flag in (True, False):
        nets = Nets(SmallNet(), pair().teachers)
        losses.append(make(name, clean_bn_pass=flag).loss(nets, Batch(images(), labels(), images(seed=5)), None, CLOCK)[0])
        tracked.append(int(nets.student.norm.num_batches_tracked))
    assert torch.equal(*losses) and tracked == [2, 1]


@pytest.mark.parametrize("name", ["ard", "iad"])
def test_below_alpha_one_the_clean_pass_stays(name: str) -> None:
    nets = Nets(SmallNet(), pair().teachers)
    make(name, alpha=0.5, clean_bn_pass=False).loss(nets, Batch(images(), labels(), images(seed=5)), None, CLOCK)
    assert nets.student.modes == [True, True]


# --- IAD


@pytest.mark.parametrize(("form", "gate"), [("iad-1", 60), ("iad-2", 40)])
def test_iad_gate_opens_at_its_epoch(form: str, gate: int) -> None:
    """(a) before E0 the teachers' terms alone; from E0, 0-based, introspection. Both sides of the gate."""
    batch = read_batch(*(logits(i) for i in range(4)), labels())
    before, at = (loss_of("iad", batch, Clock(epoch, 200, 0), form=form) for epoch in (gate - 1, gate))
    assert before[1]["introspection"] == 0 == before[1]["introspection_weight"]
    assert at[1]["introspection"] > 0 and 0 < at[1]["introspection_weight"] < 1
    assert at[0] != before[0]
    moved, _ = loss_of("iad", batch, Clock(gate - 1, 200, 0), form=form, gate_epoch=gate - 1)
    assert torch.equal(moved, at[0])


def test_iad_before_its_gate_is_ard_with_its_knobs() -> None:
    """(a) the teacher-only loss, written out."""
    s, a, t, u = (logits(i) for i in range(4))
    loss, _ = loss_of("iad", read_batch(s, a, t, u, labels()), weight_teacher_term=True)
    assert loss.item() == pytest.approx(kl(t, a).mean().item(), rel=1e-12)
    ported, _ = loss_of("ard", read_batch(s, a, t, u, labels()), tau=1, reduction="bmean")
    assert loss.item() == pytest.approx(ported.item(), rel=1e-12)


def test_akd2_is_iad_2_before_its_gate_in_every_epoch() -> None:
    batch = read_batch(*(logits(i) for i in range(4)), labels())
    early, _ = loss_of("iad", batch, form="iad-2")
    for clock in (CLOCK, LATE):
        loss, terms = loss_of("iad", batch, clock, form="akd2")
        assert torch.equal(loss, early) and terms["introspection_weight"] == 0


@pytest.mark.parametrize("form", ["iad-1", "iad-2"])
def test_iad_does_not_doubt_a_teacher_that_is_certain_and_right(form: str) -> None:
    """(b) pT(y | x') = 1: no introspection, in any epoch."""
    y = labels()
    batch = read_batch(logits(0), logits(1), logits(2), certain(y), y)
    for epoch in (0, 60, 199):
        loss, terms = loss_of("iad", batch, Clock(epoch, 200, 0), form=form)
        assert terms["introspection"].item() == pytest.approx(0, abs=1e-12)
        assert loss.item() == pytest.approx(loss_of("iad", batch, form=form)[0].item(), rel=1e-12)


def test_iad_trust_is_a_growing_weight_without_gradient() -> None:
    """(c) w in (0, 1] and monotone in pT(y | x'); both halves exact at the ends."""
    log_odds = torch.linspace(-300, 300, 601, dtype=torch.float64)
    rows = torch.stack([log_odds, torch.zeros_like(log_odds)], dim=1).requires_grad_(True)
    w, rest = trust(rows, torch.zeros(601, dtype=torch.long), 0.1)
    assert not w.requires_grad and not rest.requires_grad
    assert (w > 0).all() and (w <= 1).all() and (rest >= 0).all() and (rest < 1).all()
    assert (w.diff() >= 0).all() and (w[:300].diff() > 0).all() and (rest.diff() <= 0).all()
    assert torch.allclose(w + rest, torch.ones_like(w), atol=1e-15)
    assert torch.allclose(w, rows.detach().softmax(1)[:, 0] ** 0.1, rtol=1e-12)
    # 1 - w where w is close to 1, and a difference of the two has few digits left
    _, little = trust(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), 1e-9)
    assert little.item() == pytest.approx(1e-9 * np.log(2), rel=1e-8, abs=0)


@pytest.mark.parametrize("form", ["iad-1", "iad-2"])
def test_iad_introspective_target_is_live(form: str) -> None:
    """(d) the clean images get the gradient of S(x) as the reference: it is there, and is that of the equation."""
    y, s, a, u = labels(), logits(0), logits(1), logits(3)
    batch = read_batch(s, a, logits(2), u, y)
    loss, _ = loss_of("iad", batch, LATE, form=form)
    ours = torch.autograd.grad(loss, batch.x)[0][:, :10, 0, 0]
    z = s.clone().requires_grad_(True)
    doubt = 1 - u.softmax(1).gather(1, y[:, None]).squeeze(1) ** 0.1
    (live,) = torch.autograd.grad((doubt * kl(z, a)).mean() * (1.0 if form == "iad-1" else 0.5), z)
    assert (ours.norm(dim=1) > 1e-3).all(), "a detached target gives the clean images no gradient"
    assert torch.allclose(ours, live, rtol=1e-9, atol=1e-12)


def test_iad_2_asks_two_teachers_at_x_adv_and_clean_pass_only_while_introspective() -> None:
    for form, clock, passes in (("iad-2", CLOCK, "a"), ("iad-2", LATE, "ac"), ("akd2", LATE, "a")):
        nets, x, x_adv = pair(), images(), images(seed=5)
        nets.student.train()
        before = {role: copy.deepcopy(net.state_dict()) for role, net in nets.teachers.items()}
        loss, _ = make("iad", form=form).loss(nets, Batch(x, labels(), x_adv), None, clock)
        assert parameter_gradient(loss, nets.student).norm() > 0
        kinds = {"a": x_adv, "c": x}
        assert nets.student.modes == [True] * len(passes)
        assert all(torch.equal(seen, kinds[kind]) for seen, kind in zip(nets.student.seen, passes, strict=True))
        for role, net in nets.teachers.items():
            assert net.modes == [False] and torch.equal(net.seen[0], x_adv), f"the {role} teacher looks at x' once"
            assert all(torch.equal(value, before[role][key]) for key, value in net.state_dict().items())


def test_iad_1_asks_its_teacher_twice_once_the_gate_is_open() -> None:
    """At x for what to say, at x' for how far to be trusted; passes adversarial then clean on both sides."""
    for clock, looks in ((CLOCK, "c"), (LATE, "ca")):
        nets, kinds = pair(), {"c": images(), "a": images(seed=5)}
        make("iad").loss(nets, Batch(kinds["c"], labels(), kinds["a"]), None, clock)
        assert all(torch.equal(seen, kinds[kind]) for seen, kind in zip(nets.robust.seen, looks, strict=True))
        assert all(torch.equal(seen, kinds[kind]) for seen, kind in zip(nets.student.seen, "ac", strict=True))
        assert not nets.teachers["clean"].seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("gated", [False, True])
def test_iad_2_keeps_its_two_teachers_apart(case: Any, gated: bool) -> None:
    """The equations again, with a clean teacher that says something else: the parity tests read both off one place."""
    classes = case.shape[1]
    second = np.random.default_rng(9).standard_normal(case.shape) * 3
    nets = Nets(Reader(0, classes), {"robust": Reader(classes, classes), "clean": Reader(2 * classes, classes)})
    x, x_adv = (
        torch.from_numpy(np.concatenate(rows, axis=1))[:, :, None, None].requires_grad_(True)
        for rows in ((case.s, case.t, -second), (case.a, case.u, second))
    )
    method = make("iad", classes=classes, form="iad-2", tau=2, gate_epoch=0 if gated else 1)
    loss, _ = method.loss(nets, Batch(x, torch.as_tensor(case.y), x_adv), None, CLOCK)
    expected = one.iad_2(case, gated=gated, tau=2.0, second=second)
    clean, adversarial = torch.autograd.grad(loss, (x, x_adv), allow_unused=True)
    close(loss.item(), expected.value)
    close(adversarial[:, :classes, 0, 0], expected.grad_a)
    close(torch.zeros_like(x)[:, :classes, 0, 0] if clean is None else clean[:, :classes, 0, 0], expected.grad_s)
    assert not adversarial[:, classes:].any() and (clean is None or not clean[:, classes:].any())


@pytest.mark.parametrize("form", ["iad-1", "iad-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_open_gate_stands_extreme_logits(form: str, dtype: torch.dtype) -> None:
    """The shelf's own test runs in epoch 0, before any introspection."""
    batch = read_batch(*(1e4 * logits(i) for i in range(4)), labels())
    x, x_adv = (z.detach().to(dtype).requires_grad_(True) for z in (batch.x, batch.x_adv))
    loss, terms = loss_of("iad", Batch(x, batch.y, x_adv), LATE, form=form)
    assert loss.isfinite() and all(term.isfinite() for term in terms.values())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, x_adv)))


@pytest.mark.parametrize("form", ["iad-1", "iad-2"])
def test_open_gate_computes_half_precision_logits_in_float32(form: str) -> None:
    z = [logits(i).bfloat16().double() for i in range(4)]
    full = read_batch(*z, labels())
    half = Batch(full.x.detach().bfloat16(), full.y, full.x_adv.detach().bfloat16())
    found, _ = loss_of("iad", half, LATE, form=form)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss_of("iad", full, LATE, form=form)[0].item(), rel=1e-5)


# --- AKD


@pytest.mark.parametrize("name", ["loss", "statistics"])
def test_akd_without_its_teacher_is_pgd_at(name: str) -> None:
    """(a) also in what it does to the running statistics."""
    found = []
    for method in (make("akd", alpha=0), make("pgd-at")):
        nets = Nets(SmallNet(), pair().teachers)
        loss, _ = method.loss(nets, Batch(images(), labels(), images(seed=5)), None, CLOCK)
        found.append(parameter_gradient(loss, nets.student) if name == "loss" else nets.student.norm.running_mean)
    assert torch.allclose(*found, rtol=1e-6, atol=1e-8)


def test_akd_of_the_teacher_alone_has_the_gradient_of_the_divergence() -> None:
    """(b)."""
    a, u = logits(1), logits(3)
    batch = read_batch(logits(0), a, logits(2), u, labels())
    (ours,) = torch.autograd.grad(loss_of("akd", batch, alpha=1)[0], batch.x_adv)
    z = a.clone().requires_grad_(True)
    (divergence,) = torch.autograd.grad(kl(u, z).mean(), z)
    assert torch.allclose(ours[:, :10, 0, 0], divergence, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_akd_targets_are_distributions_and_constants(alpha: float) -> None:
    """(c) and (d): q, read off the gradient pS - q, sums to one and is the mixture; none reaches the teacher."""
    y, a, u = labels(), logits(1), logits(3)
    batch = read_batch(logits(0), a, logits(2), u, y)
    (grad,) = torch.autograd.grad(loss_of("akd", batch, alpha=alpha)[0], batch.x_adv)
    q = a.softmax(1) - 6 * grad[:, :10, 0, 0]
    assert torch.allclose(q.sum(1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(q, alpha * u.softmax(1) + (1 - alpha) * certain(y, 1.0), atol=1e-12)
    assert not grad[:, 10:].any()


# --- KD


def test_kd_looks_at_clean_images_only() -> None:
    nets, x = pair(), images()
    make("kd").loss(nets, Batch(x, labels(), images(seed=5)), None, CLOCK)
    for net in (nets.student, nets.teachers["clean"]):
        (looked,) = net.seen
        assert torch.equal(looked, x)
    assert not nets.robust.seen


def test_kd_gradient_hardly_depends_on_the_temperature() -> None:
    """What tau^2 is for (Hinton et al. 2015, section 2): at high temperatures the gradients agree."""
    grads = []
    for tau in (200, 400):
        batch = read_batch(logits(0), logits(1), logits(2), logits(3), labels())
        grads.append(torch.autograd.grad(loss_of("kd", batch, tau=tau, alpha=1)[0], batch.x)[0])
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


# --- weights of an add-on


@pytest.mark.parametrize(
    ("name", "knobs", "left"),
    [
        ("ard", {"alpha": 0.4}, lambda terms: 0.6 * terms["ce_clean"]),
        ("akd", {"alpha": 0.4}, lambda terms: 0.6 * terms["ce_label"]),
        ("iad", {}, lambda terms: terms["introspection"]),
        ("iad", {"form": "iad-2"}, lambda terms: 0.25 * terms["ce_adv"] + 0.5 * terms["introspection"]),
    ],
    ids=["ard", "akd", "iad-1", "iad-2"],
)
def test_an_add_ons_weights_reach_the_teachers_adversarial_terms_and_nothing_else(name: str, knobs: Any, left: Any) -> None:
    """The loss is linear in the weights, and without them only labels and introspection are left."""
    clocked = {"clock": LATE, **knobs}
    z = [logits(i) for i in range(4)]
    found = {}
    for key, weights in {"none": None, "ones": torch.ones(6), "zeros": torch.zeros(6), "few": torch.arange(6) / 6}.items():
        found[key], terms = loss_of(name, read_batch(*z, labels(), weights), **clocked)
        if key == "zeros":
            assert found[key].item() == pytest.approx(left(terms).item(), rel=1e-9)
    assert found["none"].item() == pytest.approx(found["ones"].item(), rel=1e-12)
    assert found["zeros"] < found["few"] < found["ones"]


# --- recipes


ONE, TWO = [{"id": "a"}], [{"id": "a"}, {"role": "clean", "id": "b"}]
CLEAN = [{"role": "clean", "id": "b"}]


def recipe(method: dict[str, Any], teachers: list[dict[str, str]]) -> Recipe:
    values = {"dataset": "fashion-mnist", "student": "resnet18", "method": method, "teachers": teachers}
    return validate(Recipe, Source(values, {("method", knob): f"mine.yaml, {knob}" for knob in method}))


@pytest.mark.parametrize(
    ("method", "teachers"),
    [
        ({"name": "mart"}, []),
        ({"name": "ard"}, ONE),
        ({"name": "akd"}, ONE),
        ({"name": "kd"}, CLEAN),
        ({"name": "iad"}, ONE),
        ({"name": "iad", "form": "iad-2"}, TWO),
        ({"name": "iad", "form": "akd2"}, TWO),
    ],
)
def test_the_form_says_which_teachers_a_recipe_needs(method: dict[str, Any], teachers: list[dict[str, str]]) -> None:
    resolved = recipe(method, teachers)
    assert Recipe.model_validate(resolved.model_dump(mode="json")) == resolved, "a resolved recipe can be read again"
    for others in ([], ONE, CLEAN, TWO):
        if others != teachers:
            with pytest.raises(ConfigError, match="wants") as caught:
                recipe(method, others)
            assert all(teacher.get("role", "robust") in caught.value.fix for teacher in teachers)


@pytest.mark.parametrize(
    ("method", "knob", "message"),
    [
        ({"name": "ard", "tau": 0}, "tau", "greater than 0"),
        ({"name": "ard", "tau": -3}, "tau", "greater than 0"),
        ({"name": "ard", "tau": float("inf")}, "tau", "finite"),
        ({"name": "ard", "alpha": 1.5}, "alpha", "less than or equal to 1"),
        ({"name": "ard", "alpha": -0.1}, "alpha", "greater than or equal to 0"),
        ({"name": "ard", "reduction": "mean"}, "reduction", "'bmean', 'emean' or 'sum'"),
        ({"name": "ard", "teacher_input": "both"}, "teacher_input", "'clean' or 'adversarial'"),
        ({"name": "iad", "tau": 0}, "tau", "greater than 0"),
        ({"name": "iad", "alpha": 2}, "alpha", "less than or equal to 1"),
        ({"name": "iad", "beta": -1}, "beta", "greater than or equal to 0"),
        ({"name": "iad", "gate_epoch": -1}, "gate_epoch", "greater than or equal to 0"),
        ({"name": "iad", "form": "iad-3"}, "form", "'iad-1', 'iad-2' or 'akd2'"),
        ({"name": "iad", "alpha_clean": 0.5}, "alpha_clean", "iad-1 has no such knob"),
        ({"name": "iad", "form": "iad-2", "alpha": 0.5}, "alpha", "iad-2 has no such knob"),
        ({"name": "iad", "form": "akd2", "gate_epoch": 3}, "gate_epoch", "akd2 has no such knob"),
        ({"name": "akd", "alpha": 7}, "alpha", "less than or equal to 1"),
        ({"name": "kd", "tau": 0}, "tau", "greater than 0"),
        ({"name": "kd", "alpha": -1}, "alpha", "greater than or equal to 0"),
        ({"name": "mart", "beta": -1}, "beta", "greater than or equal to 0"),
    ],
)
def test_a_bad_knob_is_named_with_its_place_and_value(method: dict[str, Any], knob: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        recipe(method, TWO)
    assert caught.value.what.startswith(f"method.{knob}: ")
    assert caught.value.where == f"mine.yaml, {knob}"
    assert caught.value.fix.startswith(("it is ", "did you mean ", "valid: "))


@pytest.mark.parametrize(
    ("name", "typo", "meant"),
    [
        ("ard", "tua", "tau"),
        ("ard", "teacher_inputs", "teacher_input"),
        ("iad", "gate_epochs", "gate_epoch"),
        ("akd", "alhpa", "alpha"),
        ("kd", "taus", "tau"),
        ("mart", "betta", "beta"),
    ],
)
def test_a_misspelt_knob_is_answered_with_the_nearest(name: str, typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{typo} is not a field") as caught:
        recipe({"name": name, typo: 1}, ONE)
    assert caught.value.fix == f"did you mean {meant}?" and caught.value.where == f"mine.yaml, {typo}"


def test_iad_2_weights_leave_no_negative_share_to_the_label() -> None:
    with pytest.raises(ConfigError, match=r"alpha_robust \+ alpha_clean is 1.15, more than 1"):
        recipe({"name": "iad", "form": "iad-2", "alpha_robust": 0.9}, TWO)
    recipe({"name": "iad", "form": "iad-2", "alpha_robust": 0.75}, TWO)
