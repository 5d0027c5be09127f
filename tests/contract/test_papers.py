"""What one paper says of its own method: the numbered tests of the specification."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from robustkd.losses import kl
from robustkd.methods._base import Batch, Nets
from robustkd.methods._repair import exchange, repaired
from robustkd.methods.dgad import Dgad
from tests.contract.test_methods import attack, parameter_gradient, rng, step
from tests.nets import CLOCK, SmallNet, frozen, images, labels, make, outer, picture, readers
from tests.parity.equations_variants import ABLATION, PARTS


def pair(*, double: bool = False) -> Nets:
    student, teacher = SmallNet().eval(), frozen(SmallNet(seed=7))
    return Nets(student.double(), {"robust": teacher.double()}) if double else Nets(student, {"robust": teacher})


# --- PGD-AT


def test_pgd_at_raises_cross_entropy_over_clean() -> None:
    nets, x, y = pair(), images(), labels()
    x_adv = attack(make("pgd-at"), nets, x, y, steps=10)
    ce = torch.nn.functional.cross_entropy
    assert ce(nets.student(x_adv), y) > ce(nets.student(x), y)


@pytest.mark.parametrize("name", ["pgd-at", "adaad"])
def test_weightless_clean_pass_can_be_left_out_and_only_moves_statistics(name: str) -> None:
    losses, tracked = [], []
    for flag in (True, False):
        nets = Nets(SmallNet(), pair().teachers)
        loss, _ = step(make(name, clean_bn_pass=flag), nets, images(), labels(), images(seed=5))
        losses.append(loss.item())
        tracked.append(int(nets.student.norm.num_batches_tracked))
    assert losses[0] == losses[1] and tracked == [2, 1]


def test_adaad_below_alpha_one_keeps_its_clean_pass() -> None:
    nets = Nets(SmallNet(), pair().teachers)
    step(make("adaad", alpha=0.5, clean_bn_pass=False), nets, images(), labels(), images(seed=5))
    assert int(nets.student.norm.num_batches_tracked) == 2


# --- TRADES


def test_trades_target_is_live() -> None:
    """With the label term taken away, the gradient differs from that of a detached target."""
    nets, x, x_adv, y = pair(), images(), images(seed=5), labels()
    batch = Batch(x, y, x_adv)
    with_kl, _ = make("trades", beta=6).loss(nets, batch, None, CLOCK)
    label_only, _ = make("trades", beta=0).loss(nets, batch, None, CLOCK)
    ours = parameter_gradient(with_kl - label_only, nets.student) / 6
    detached = kl(nets.student(x).detach(), nets.student(x_adv)).mean()
    live = kl(nets.student(x), nets.student(x_adv)).mean()
    assert torch.allclose(ours, parameter_gradient(live, nets.student), rtol=1e-4, atol=1e-6)
    assert (ours - parameter_gradient(detached, nets.student)).norm() > 0.1 * ours.norm()


def test_trades_needs_its_noise() -> None:
    nets, x = pair(double=True), images().double()
    objective = make("trades").inner(nets, x, labels())

    def size(at: Tensor) -> float:
        at = at.requires_grad_(True)
        return float(torch.autograd.grad(objective(at).sum(), at)[0].norm())

    noise = torch.randn(x.shape, generator=rng(), dtype=torch.float64)
    assert size(x.clone()) < 1e-12 < 1e-6 < size(x + 0.001 * noise)


@pytest.mark.parametrize("name", ["trades", "rslad", "adaad", "dgad"])
def test_labels_do_not_influence_the_attack(name: str) -> None:
    x_adv = [attack(make(name), pair(), images(), labels(seed=seed)) for seed in (2, 3)]
    assert torch.equal(*x_adv)


# --- RSLAD


def test_rslad_uses_no_label() -> None:
    losses = [
        step(make("rslad"), Nets(SmallNet(), pair().teachers), images(), labels(seed=s), images(seed=5))[0] for s in (2, 3)
    ]
    assert torch.equal(*losses)


def test_rslad_and_adaad_vanish_where_student_and_teacher_agree() -> None:
    logits = torch.randn(6, 10, generator=rng())
    x = picture(logits, logits)
    for name in ("rslad", "adaad"):
        loss, _ = make(name).loss(readers(10), Batch(x, labels(), x), None, CLOCK)
        assert loss.item() == pytest.approx(0, abs=1e-15)


def test_rslad_attack_gradient_is_that_of_the_equation() -> None:
    """J_S^T (pS(x') - t) by finite differences of the logits."""
    nets, x = pair(double=True), images(2, size=3).double()
    x_adv = (x + 0.01).requires_grad_(True)
    (grad,) = torch.autograd.grad(make("rslad").inner(nets, x, labels(2))(x_adv).sum(), x_adv)
    residual = (nets.student(x_adv).softmax(1) - nets.robust(x).softmax(1)).detach()
    at, h = x_adv.detach(), 1e-6
    for index in [(0, 0, 0, 0), (0, 2, 1, 2), (1, 1, 2, 0)]:
        delta = torch.zeros_like(at)
        delta[index] = h
        jacobian = (nets.student(at + delta) - nets.student(at - delta)) / (2 * h)
        assert grad[index].item() == pytest.approx((jacobian * residual).sum().item(), rel=1e-5, abs=1e-9)


def test_rslad_weights_are_five_to_one() -> None:
    x, x_adv = images(), images(seed=5)
    nets = pair()
    loss, terms = make("rslad").loss(nets, Batch(x, labels(), x_adv), None, CLOCK)
    target = nets.robust(x)
    u, v = kl(target, nets.student(x_adv)).mean() / 10, kl(target, nets.student(x)).mean() / 10
    assert loss.item() == pytest.approx(((5 * u + v) / 6).item(), rel=1e-6)
    assert (terms["kl_adv"].item(), terms["kl_clean"].item()) == pytest.approx((u.item(), v.item()))


def test_rslad_teacher_sees_clean_images_only() -> None:
    nets, x, y = pair(), images(), labels()
    x_adv = attack(make("rslad"), nets, x, y)
    step(make("rslad"), nets, x, y, x_adv)
    assert nets.robust.seen and all(torch.equal(seen, x) for seen in nets.robust.seen)
    assert len(nets.robust.seen) == 2, "one look for the attack, one for the loss"


@pytest.mark.parametrize(("variant", "expected", "tolerance"), [("fixed", 0.0, 1e-15), ("code", 9.98e-6, 2e-8)])
def test_rslad_of_a_perfect_student_is_zero_or_the_floors_bias(variant: str, expected: float, tolerance: float) -> None:
    logits = torch.randn(600, 10, generator=rng()).double()
    x = picture(logits, logits)
    loss, _ = make("rslad", variant=variant).loss(readers(10), Batch(x, labels(600), x), None, CLOCK)
    assert loss.item() == pytest.approx(expected, abs=tolerance)


# --- AdaAD


def test_adaad_attack_gradient_is_the_closed_form() -> None:
    """J_S^T (pS - pT) + J_T^T (pT (log pT/pS - KL)), to 1e-10 in double precision."""
    nets, x = pair(double=True), images().double()
    at = (x + 0.01).requires_grad_(True)
    (grad,) = torch.autograd.grad(make("adaad").inner(nets, x, labels())(at).sum(), at)
    s, t = nets.student(at), nets.robust(at)
    log_s, log_t = s.log_softmax(1).detach(), t.log_softmax(1).detach()
    p_s, p_t = log_s.exp(), log_t.exp()
    gap = log_t - log_s
    down = p_t * (gap - (p_t * gap).sum(1, keepdim=True))
    (expected,) = torch.autograd.grad((s * (p_s - p_t)).sum() + (t * down).sum(), at)
    assert (grad - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


def test_adaad_of_a_student_equal_to_its_teacher_stands_still() -> None:
    net = frozen(SmallNet().double())
    x = images().double().requires_grad_(True)
    objective = make("adaad").inner(Nets(net, {"robust": net}), x, labels())
    values = objective(x)
    (grad,) = torch.autograd.grad(values.sum(), x)
    assert values.abs().max() == 0 and grad.abs().max() < 1e-14


@pytest.mark.parametrize(("classes", "default"), [(2, "emean"), (10, "emean"), (11, "bmean"), (100, "bmean"), (200, "bmean")])
def test_adaad_reductions_differ_by_the_class_count(classes: int, default: str) -> None:
    x, x_adv = (picture(*torch.randn(2, 4, classes, generator=rng(i))) for i in (0, 1))
    batch = Batch(x, labels(4, classes=classes), x_adv)
    value = {}
    for how in ("emean", "bmean", None):
        loss, _ = make("adaad", classes=classes, reduction=how).loss(readers(classes), batch, None, CLOCK)
        value[how] = loss.item()
    assert value["bmean"] / value["emean"] == pytest.approx(classes, rel=1e-12)
    assert value[None] == value[default]


# --- AdaIAD


def test_adaiad_before_its_gate_is_the_teachers_term_alone() -> None:
    method, batch = make("adaad", introspection=True, gate_epoch=60), Batch(images(), labels(), images(seed=5))
    nets = pair()
    before, at = (method.loss(nets, batch, None, replace(CLOCK, epoch=epoch)) for epoch in (59, 60))
    teacher = 900 * kl(nets.robust(batch.x_adv), nets.student(batch.x_adv), tau=30).mean()
    assert before[0].item() == pytest.approx(teacher.item(), rel=1e-4)
    assert "kl_own" not in before[1] and at[1]["kl_own"] > 0
    assert (at[0] - at[1]["kl_own"]).item() == pytest.approx(before[0].item(), rel=1e-5)


def test_adaiad_trusts_a_teacher_that_is_certain_of_the_label() -> None:
    y = labels()
    sure = 200.0 * torch.nn.functional.one_hot(y, 10)
    batch = [picture(torch.randn(6, 10, generator=rng(i)), sure) for i in (0, 1)]
    _, found = make("adaad", introspection=True, gate_epoch=0).loss(readers(10), Batch(batch[0], y, batch[1]), None, CLOCK)
    assert found["kl_own"] == 0 and found["trust"] == 1


def test_adaiad_trust_grows_with_the_teachers_probability_of_the_label() -> None:
    y, found = labels(), []
    for logit in (-5.0, 0.0, 2.0, 5.0):
        x = picture(torch.zeros(6, 10), logit * torch.nn.functional.one_hot(y, 10))
        _, terms = make("adaad", introspection=True).loss(readers(10), Batch(x, y, x), None, CLOCK)
        found.append(terms["trust"].item())
    assert 0 < found[0] < found[1] < found[2] < found[3] < 1


def test_adaiad_target_is_live() -> None:
    x, x_adv = (picture(*torch.randn(2, 6, 10, generator=rng(i))).requires_grad_(True) for i in (0, 1))
    loss, _ = make("adaad", introspection=True, gate_epoch=0).loss(readers(10), Batch(x, labels(), x_adv), None, CLOCK)
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[:, :10].flatten(1).norm(dim=1) > 1e-6).all()


@pytest.mark.parametrize(("epoch", "clean_bn_pass", "passes"), [(0, True, 2), (0, False, 1), (60, False, 2)])
def test_adaiad_passes(epoch: int, clean_bn_pass: bool, passes: int) -> None:
    nets = Nets(SmallNet(), pair().teachers)
    method = make("adaad", introspection=True, clean_bn_pass=clean_bn_pass)
    method.loss(nets, Batch(images(), labels(), images(seed=5)), None, replace(CLOCK, epoch=epoch))
    assert len(nets.student.seen) == passes


def test_adaiad_has_no_clean_teacher_term_and_adaad_none_of_its_knobs() -> None:
    with pytest.raises(ValidationError, match="leave alpha at 1"):
        make("adaad", introspection=True, alpha=0.5)
    for knob in ({"tau": 2}, {"gate_epoch": 0}, {"beta": 1}, {"weight_teacher_term": True}):
        with pytest.raises(ValidationError, match="add introspection: true"):
            make("adaad", **knob)
    written_out = make("adaad").config.model_dump()
    assert make("adaad", **{k: v for k, v in written_out.items() if k != "name"}).config == make("adaad").config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaiad_past_its_gate_stands_extreme_logits(dtype: torch.dtype) -> None:
    s, a, t, u = (1e4 * torch.randn(6, 10, generator=rng(i)) for i in range(4))
    x, x_adv = (picture(*pair).to(dtype).requires_grad_(True) for pair in ((s, t), (a, u)))
    loss, terms = make("adaad", introspection=True, gate_epoch=0).loss(readers(10), Batch(x, labels(), x_adv), None, CLOCK)
    assert loss.isfinite() and all(term.isfinite() for term in terms.values())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, x_adv)))


# --- AdvFunMatch


def test_advfunmatch_shows_teacher_and_student_the_same_images() -> None:
    nets, method = pair(), make("advfunmatch")
    x_adv = attack(method, nets, images(), labels())
    step(method, nets, images(), labels(), x_adv)
    assert len(nets.robust.seen) == len(nets.student.seen) > 2
    assert all(torch.equal(t, s) for t, s in zip(nets.robust.seen, nets.student.seen, strict=True))


def test_advfunmatch_without_augmentation_is_adaad_with_bmean() -> None:
    found = []
    for method in (make("advfunmatch"), make("adaad", alpha=1, reduction="bmean")):
        nets = Nets(SmallNet(), pair().teachers)
        x_adv = attack(method, nets, images(), labels())
        loss, _ = step(method, nets, images(), labels(), x_adv)
        found.append((x_adv, loss, parameter_gradient(loss, nets.student), nets.student.norm.running_mean))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_advfunmatch_uses_no_label() -> None:
    found = []
    for seed in (2, 3):
        nets, y = pair(), labels(seed=seed)
        x_adv = attack(make("advfunmatch"), nets, images(), y)
        found.append((x_adv, step(make("advfunmatch"), nets, images(), y, x_adv)[0]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


# --- DGAD


def _settings(row: str) -> dict[str, Any]:
    """The switches that Dgad's docstring gives for one row of the ablation."""
    lines = (inspect.getmodule(Dgad).__doc__ or "").splitlines()
    (line,) = [text for text in lines if text.startswith(f"    {row}  ")]
    words = [word.removeprefix("method.").split("=") for word in line.split() if word.startswith("method.")]
    return {key: value == "true" for key, value in words}


@pytest.mark.parametrize("row", ABLATION)
def test_dgad_says_how_to_set_each_row_of_its_ablation(row: str) -> None:
    config = Dgad.Config(name="dgad", **_settings(row))
    assert tuple(part for part in PARTS if getattr(config, part)) == ABLATION[row]


def test_dgad_without_its_parts_is_adaad_with_bmean() -> None:
    batch = Batch(images(), labels(), images(seed=5))
    ours, *_ = outer(make("dgad", **_settings("base")), pair(), batch)
    theirs, *_ = outer(make("adaad", reduction="bmean"), pair(), batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_dgad_refuses_knobs_without_a_use() -> None:
    for knobs in ({"repair_share": 0.5}, {"batch_size": 64}, {"variant": "paper", "batch_size": 64}):
        with pytest.raises(ValidationError, match="this is of"):
            make("dgad", **knobs)
    assert make("dgad", repair="mix", repair_share=0.5).config.repair_share == 0.5
    assert make("dgad", variant="code", batch_size=64).config.batch_size == 64


@pytest.mark.parametrize("how", ["smooth", "mix"])
def test_other_repairs_make_the_label_the_likeliest_and_leave_right_rows(how: Any) -> None:
    logits, y = torch.randn(200, 7, generator=rng()), torch.randint(7, (200,), generator=rng(1))
    wrong = logits.argmax(1) != y
    out, given = repaired(logits, y, wrong, how=how, share=0.1), logits.softmax(1)
    target = out.softmax(1)
    assert torch.equal(out.argmax(1), y) and torch.allclose(target.sum(1), torch.ones(200))
    assert torch.allclose(target[~wrong], given[~wrong], atol=1e-6)
    onehot = torch.nn.functional.one_hot(y, 7)
    rest = given if how == "mix" else torch.full_like(given, 1 / 7)
    assert torch.allclose(target[wrong], (0.9 * onehot + 0.1 * rest)[wrong], atol=1e-6)


def test_other_repairs_of_a_certain_teacher_stay_finite() -> None:
    logits, y = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1])
    for how in ("smooth", "mix"):
        out = repaired(logits, y, torch.tensor([True]), how=how, share=0.3)  # type: ignore[arg-type]
        assert out.isfinite().all() and out.softmax(1)[0, 1] == pytest.approx(0.8 if how == "smooth" else 0.7)


def test_dgad_as_coded_over_weighs_a_short_batch() -> None:
    nets, batch = _right_teacher()
    losses = {v: make("dgad", beta=0, variant=v).loss(nets, batch, None, CLOCK)[0].item() for v in ("fixed", "code")}
    assert losses["code"] == pytest.approx(losses["fixed"], rel=1e-6), "with no row wrong both are means over the rows"
    logits = torch.zeros(6, 10)
    logits[:2] = 4.0 * torch.nn.functional.one_hot((batch.y[:2] + 1) % 10, 10)  # two rows wrong
    logits[2:] = 4.0 * torch.nn.functional.one_hot(batch.y[2:], 10)
    x = picture(torch.randn(6, 10, generator=rng()), logits)
    _, found = make("dgad", beta=0).loss(readers(10), Batch(x, batch.y, x), None, CLOCK)
    coded, _ = make("dgad", beta=0, variant="code").loss(readers(10), Batch(x, batch.y, x), None, CLOCK)
    st, at = found["kl_clean"].item() * 6, found["kl_adv"].item() * 6
    assert coded.item() == pytest.approx(st / 128 + at / 4 * 126 / 128, rel=1e-6)


def test_dgad_as_coded_survives_a_teacher_wrong_everywhere() -> None:
    y = labels()
    x = picture(torch.randn(6, 10, generator=rng()), 4.0 * torch.nn.functional.one_hot((y + 1) % 10, 10)).requires_grad_(True)
    for kl_scale in (1.0, 0.5):
        method = make("dgad", variant="code", beta=1, kl_scale=kl_scale)
        loss, _ = method.loss(readers(10), Batch(x, y, x), None, CLOCK)
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_dgad_of_the_paper_leaves_wrong_rows_clean_in_the_adversarial_pass() -> None:
    nets, x, x_adv = pair(), images(), images(seed=5)
    right = nets.robust(x).argmax(1)
    y = right.clone()
    y[:2] = (right[:2] + 1) % 10
    make("dgad", variant="paper").loss(nets, Batch(x, y, x_adv), None, CLOCK)
    clean, adversarial = nets.student.seen
    assert torch.equal(clean, x)
    assert torch.equal(adversarial, torch.cat([x[:2], x_adv[2:]]))


def _right_teacher() -> tuple[Nets, Batch]:
    """A pair of nets, and labels by the teacher, which it keeps at x'."""
    nets = pair()
    x = images()
    y = nets.robust(x).argmax(1)
    return nets, Batch(x, y, (x + 1e-4).clamp(0, 1))


def test_dgad_of_a_teacher_always_right_is_adaad_plus_pcr() -> None:
    nets, batch = _right_teacher()
    assert torch.equal(nets.robust(batch.x_adv).argmax(1), batch.y)
    loss, terms = make("dgad", beta=5).loss(nets, batch, None, CLOCK)
    adaad, _ = make("adaad", reduction="bmean").loss(nets, batch, None, CLOCK)
    assert terms["teacher_wrong"] == 0 and terms["kl_clean"] == 0
    assert (loss - 5 * terms["pcr"]).item() == pytest.approx(adaad.item(), rel=1e-5)


def test_dgad_without_pcr_has_adaads_parameter_gradient() -> None:
    nets, batch = _right_teacher()
    ours, _ = make("dgad", beta=0).loss(nets, batch, None, CLOCK)
    adaad, _ = make("adaad", reduction="bmean").loss(nets, batch, None, CLOCK)
    expected = parameter_gradient(adaad, nets.student)
    assert torch.allclose(parameter_gradient(ours, nets.student), expected, rtol=1e-5, atol=1e-7)


def test_exchange_repairs_rows_and_nothing_else() -> None:
    generator = rng()
    logits, y = torch.randn(200, 7, generator=generator), torch.randint(7, (200,), generator=generator)
    wrong = logits.argmax(1) != y
    once = exchange(logits, y, wrong)
    assert wrong.any() and not wrong.all()
    assert torch.equal(once.argmax(1), y)
    assert torch.equal(once.sort(1).values, logits.sort(1).values)
    assert torch.equal(once[~wrong], logits[~wrong])
    changed = (once != logits).sum(1)
    assert torch.equal(changed, 2 * wrong.long()), "exactly two logits of a wrong row move"
    assert torch.equal(exchange(once, y, once.argmax(1) != y), once)
    assert torch.allclose(once.softmax(1).sum(1), torch.ones(200))
    assert torch.equal(logits, torch.randn(200, 7, generator=rng())), "the input is left alone"


def test_exchange_under_ties_keeps_the_row_a_permutation() -> None:
    logits = torch.tensor([[2.0, 2, 0], [1, 1, 1], [0, 3, 3]])
    y = torch.tensor([1, 2, 0])
    out = exchange(logits, y, torch.tensor([True, True, True]))
    assert torch.equal(out.sort(1).values, logits.sort(1).values)
    assert torch.equal(out[2], torch.tensor([3.0, 0, 3]))


@pytest.mark.parametrize("wrong", ["none", "some", "all"])
def test_dgad_gives_each_image_one_distillation_term(wrong: str) -> None:
    """Which student logits get a distillation gradient: x of a wrong row, x' of a right one, never both."""
    classes, rows = 5, 6
    y = labels(rows, classes=classes)
    mask = {"none": torch.zeros(rows), "some": torch.arange(rows) % 2, "all": torch.ones(rows)}[wrong].bool()
    teacher = torch.nn.functional.one_hot((y + mask.long()) % classes, classes) * 4.0
    x = picture(torch.randn(rows, classes, generator=rng(1)), teacher).requires_grad_(True)
    x_adv = picture(torch.randn(rows, classes, generator=rng(2)), teacher).requires_grad_(True)
    loss, terms = make("dgad", classes=classes, beta=0).loss(readers(classes), Batch(x, y, x_adv), None, CLOCK)
    clean, adversarial = torch.autograd.grad(loss, (x, x_adv))
    assert torch.equal(clean.flatten(1).any(1), mask)
    assert torch.equal(adversarial.flatten(1).any(1), ~mask)
    assert loss.isfinite() and terms["teacher_wrong"].item() == pytest.approx(mask.float().mean().item())
    assert wrong != "all" or terms["kl_adv"] == 0
    assert wrong != "none" or terms["kl_clean"] == 0


def test_dgad_pcr_vanishes_at_the_clean_image_and_reaches_both_passes() -> None:
    nets, x = pair(), images()
    _, terms = make("dgad").loss(nets, Batch(x, labels(), x), None, CLOCK)
    assert terms["pcr"] == 0
    batch = [picture(*torch.randn(2, 6, 10, generator=rng(i))).requires_grad_(True) for i in (0, 1)]
    grads = []
    for beta in (0, 5):
        loss, _ = make("dgad", beta=beta).loss(readers(10), Batch(batch[0], labels(), batch[1]), None, CLOCK)
        grads.append(torch.autograd.grad(loss, batch))
    for without, with_pcr in zip(*grads, strict=True):
        assert ((with_pcr - without)[:, :10].flatten(1).norm(dim=1) > 1e-6).all(), "PCR covers all rows, both passes"


def test_dgad_ablation_switches_do_what_they_name() -> None:
    classes, y = 3, torch.tensor([0, 0])
    s, a = torch.randn(2, 2, classes, generator=rng(), dtype=torch.float64)
    teacher = torch.tensor([[0.0, 4, 1], [4, 0, 1]], dtype=torch.float64)  # wrong, right
    under_attack = torch.tensor([[0.0, 4, 1], [0, 4, 1]], dtype=torch.float64)  # wrong on both
    batch = Batch(picture(s, teacher), y, picture(a, under_attack))

    def terms(**knobs: bool) -> tuple[float, float]:
        _, found = make("dgad", classes=classes, **knobs).loss(readers(classes), batch, None, CLOCK)
        return found["kl_clean"].item(), found["kl_adv"].item()

    swapped = torch.tensor([[4.0, 0, 1]], dtype=torch.float64)
    assert terms() == pytest.approx((kl(swapped, s[:1]).item() / 2, kl(swapped, a[1:]).item() / 2))
    assert terms(swap_clean=False)[0] == pytest.approx(kl(teacher[:1], s[:1]).item() / 2)
    assert terms(swap_adversarial=False)[1] == pytest.approx(kl(under_attack[1:], a[1:]).item() / 2)
    assert terms(partition=False) == pytest.approx((0, kl(swapped.repeat(2, 1), a).mean().item()))
