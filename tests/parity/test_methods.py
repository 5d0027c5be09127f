"""Every inner objective and outer loss against the papers' equations in float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from robustkd.catalog import Shelf
from robustkd.methods._base import Batch
from tests.nets import CLOCK, make, outer, picture, readers
from tests.parity import equations as eq
from tests.parity import equations_one_teacher as one
from tests.parity import equations_saad as saad
from tests.parity import equations_two_teachers as two
from tests.parity import equations_variants as variants
from tests.parity.equations import Array, Case, Inner, Labels, Outer

TOLERANCE = 1e-6


def random_case(rows: int, classes: int, *, seed: int = 0, scale: float = 3.0) -> Case:
    rng = np.random.default_rng(seed)
    s, a, t, u = (scale * rng.standard_normal((rows, classes)) for _ in range(4))
    return Case(s, a, t, u, rng.integers(classes, size=rows))


def with_teacher(case: Case, *, right_clean: bool, right_adv: bool) -> Case:
    """The same case with a teacher that is right (or wrong) on every row."""

    def steer(logits: Array, y: Labels, right: bool) -> Array:
        steered = logits.copy()
        rows = np.arange(len(y))
        target = y if right else (y + 1) % logits.shape[1]
        steered[rows, target] = logits.max(1) + 1
        return steered

    return Case(case.s, case.a, steer(case.t, case.y, right_clean), steer(case.u, case.y, right_adv), case.y)


def tied() -> Case:
    """Ties of label and rival, before and behind the label, on clean and adversarial images, and all-equal rows."""
    t = np.array([[2.0, 2, 0], [2, 2, 0], [1, 1, 1], [0, 3, 3], [3, 0, 3], [1, 1, 1]])
    u = np.array([[1.0, 1, 0], [0, 1, 1], [2, 2, 2], [3, 3, 3], [0, 4, 4], [5, 5, 0]])
    rng = np.random.default_rng(5)
    return Case(rng.standard_normal((6, 3)), rng.standard_normal((6, 3)), t, u, np.array([0, 1, 0, 2, 2, 2]))


_BASE = random_case(8, 10, seed=3)
CASES: dict[str, Case] = {
    "random": _BASE,
    "one image": random_case(1, 10, seed=1),
    "odd last batch": random_case(5, 10, seed=2),
    "two classes": random_case(7, 2, seed=4),
    "200 classes": random_case(6, 200, seed=6),
    "teacher right everywhere": with_teacher(_BASE, right_clean=True, right_adv=True),
    "teacher wrong everywhere": with_teacher(_BASE, right_clean=False, right_adv=False),
    "teacher right only on clean images": with_teacher(_BASE, right_clean=True, right_adv=False),
    "teacher right only under attack": with_teacher(_BASE, right_clean=False, right_adv=True),
    "one image, teacher wrong": with_teacher(random_case(1, 3), right_clean=False, right_adv=False),
    "student equals teacher": Case(_BASE.t, _BASE.u, _BASE.t, _BASE.u, _BASE.y),
    "ties": tied(),
    "confident": random_case(6, 10, seed=8, scale=30.0),
}


def _default_reduction(case: Case) -> str:
    return "emean" if case.shape[1] <= 10 else "bmean"


OUTER: dict[str, tuple[str, dict[str, Any], Callable[[Case], Outer]]] = {
    "standard": ("standard", {}, eq.standard),
    "pgd-at": ("pgd-at", {}, eq.pgd_at),
    "pgd-at without the clean pass": ("pgd-at", {"clean_bn_pass": False}, eq.pgd_at),
    "trades": ("trades", {}, eq.trades),
    "trades, beta 2.5": ("trades", {"beta": 2.5}, lambda c: eq.trades(c, 2.5)),
    "trades, beta 0": ("trades", {"beta": 0}, lambda c: eq.trades(c, 0.0)),
    "rslad": ("rslad", {}, eq.rslad),
    "rslad, bmean": ("rslad", {"reduction": "bmean"}, lambda c: eq.rslad(c, reduction="bmean")),
    "rslad, CIFAR-100": ("rslad", {"scale": 10}, lambda c: eq.rslad(c, scale=10.0)),
    "adaad": ("adaad", {}, lambda c: eq.adaad(c, reduction=_default_reduction(c))),
    "adaad, alpha 0.3": ("adaad", {"alpha": 0.3}, lambda c: eq.adaad(c, alpha=0.3, reduction=_default_reduction(c))),
    "adaad, alpha 0": ("adaad", {"alpha": 0}, lambda c: eq.adaad(c, alpha=0.0, reduction=_default_reduction(c))),
    "adaad, bmean": ("adaad", {"reduction": "bmean"}, lambda c: eq.adaad(c, reduction="bmean")),
    "adaad, emean": ("adaad", {"reduction": "emean"}, lambda c: eq.adaad(c, reduction="emean")),
    "dgad": ("dgad", {}, eq.dgad),
    "dgad, MobileNetV2": ("dgad", {"beta": 10, "kl_scale": 0.5}, lambda c: eq.dgad(c, beta=10.0, kl_scale=0.5)),
    "dgad, beta 0": ("dgad", {"beta": 0}, lambda c: eq.dgad(c, beta=0.0)),
    "advfunmatch": ("advfunmatch", {}, lambda c: eq.adaad(c, reduction="bmean")),
    "advfunmatch, emean": ("advfunmatch", {"reduction": "emean"}, lambda c: eq.adaad(c, reduction="emean")),
    "mtard": ("mtard", {}, two.mtard),
    "mtard, CIFAR-100": ("mtard", {"scale": 10}, lambda c: two.mtard(c, scale=10.0)),
    "mtard, as coded": ("mtard", {"variant": "code"}, lambda c: two.mtard(c, floor=1e-5)),
    "b-mtard": ("b-mtard", {}, two.b_mtard),
    "b-mtard, as coded": ("b-mtard", {"variant": "code"}, lambda c: two.b_mtard(c, floor=1e-5)),
}
INNER: dict[str, Callable[[Case], Inner]] = {
    "standard": eq.inner_label,
    "pgd-at": eq.inner_label,
    "trades": eq.inner_trades,
    "rslad": eq.inner_rslad,
    "adaad": eq.inner_adaad,
    "dgad": eq.inner_adaad,
    "advfunmatch": eq.inner_adaad,
    "mtard": eq.inner_label,
    "b-mtard": eq.inner_label,
}
OUTER |= one.OUTER | variants.OUTER | saad.OUTER
INNER |= one.INNER | saad.INNER


def close(ours: Any, theirs: Any) -> None:
    """Relative to the largest entry: a difference of 1e-9 of the largest gradient is not an error."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(
        np.asarray(ours), theirs, rtol=TOLERANCE, atol=TOLERANCE * max(1e-6, float(np.abs(theirs).max()))
    )


def test_every_method_has_an_equation_here() -> None:
    covered = {name for name, _, _ in OUTER.values()}
    missing = [name for name in Shelf("methods").names() if name not in covered or name not in INNER]
    assert not missing, f"write the equations of {missing} in tests/parity/equations.py"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("name", "knobs", "equation"), OUTER.values(), ids=OUTER.keys())
def test_outer_loss(name: str, knobs: dict[str, Any], equation: Callable[[Case], Outer], case: Case) -> None:
    classes = case.shape[1]
    x = picture(case.s, case.t).requires_grad_(True)
    x_adv = picture(case.a, case.u).requires_grad_(True)
    method = make(name, classes=classes, **knobs)
    loss, *_ = outer(method, readers(classes), Batch(x, torch.as_tensor(case.y), x_adv))
    grads = torch.autograd.grad(loss, (x, x_adv), allow_unused=True)
    (clean, adversarial) = [torch.zeros_like(x) if g is None else g for g in grads]

    expected = equation(case)
    close(loss.item(), expected.value)
    close(clean[:, :classes, 0, 0], expected.grad_s)
    close(adversarial[:, :classes, 0, 0], expected.grad_a)
    assert not clean[:, classes:].any(), "the outer loss sends a gradient into the teacher"
    assert not adversarial[:, classes:].any(), "the outer loss sends a gradient into the teacher"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("name", "equation"), INNER.items(), ids=INNER.keys())
def test_inner_objective(name: str, equation: Callable[[Case], Inner], case: Case) -> None:
    classes = case.shape[1]
    x, x_adv = picture(case.s, case.t), picture(case.a, case.u).requires_grad_(True)
    objective = make(name, classes=classes).inner(readers(classes), x, torch.as_tensor(case.y))
    values = objective(x_adv)
    (grad,) = torch.autograd.grad(values.sum(), x_adv)

    expected = equation(case)
    assert values.shape == (case.shape[0],)
    close(values.detach(), expected.values)
    close(grad[:, :classes, 0, 0], expected.grad_a)
    close(grad[:, classes:, 0, 0], expected.grad_u)


@pytest.mark.parametrize(("name", "knobs", "equation"), OUTER.values(), ids=OUTER.keys())
def test_closed_form_gradients_are_those_of_the_values(name: str, knobs: Any, equation: Callable[[Case], Outer]) -> None:
    """The derivation itself, by central differences: otherwise both sides could share one slip."""
    case, step = random_case(3, 4, seed=11), 1e-6
    result = equation(case)
    for side, grad in (("s", result.grad_s), ("a", result.grad_a)):
        for index in np.ndindex(*grad.shape):
            values = []
            for sign in (1, -1):
                moved = {"s": case.s.copy(), "a": case.a.copy()}
                moved[side][index] += sign * step
                values.append(equation(Case(moved["s"], moved["a"], case.t, case.u, case.y)).value)
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(grad[index], rel=1e-5, abs=1e-9)


def _row(y: int, log_odds: float, classes: int = 10) -> tuple[Array, Array]:
    """Student logits with CE against the label of `log_odds`, and others 0.02 away in squared probability."""
    p = np.full(classes, (1 - np.exp(-log_odds)) / (classes - 1))
    p[y] = np.exp(-log_odds)
    q = p.copy()
    q[y] -= 0.1  # (0.1)^2 + (0.1)^2 = 0.02 in all, 0.002 as a mean over ten classes
    q[(y + 1) % classes] += 0.1
    return np.log(p), np.log(q)


@pytest.mark.parametrize(
    ("variant", "kl_scale", "expected"),
    [("fixed", 1.0, 0.35516), ("fixed", 0.5, 0.18758), ("code", 1.0, 0.35516), ("code", 0.5, 0.16789)],
)
def test_dgad_numeric_check(variant: str, kl_scale: float, expected: float) -> None:
    """n1 = 9 of 128 rows wrong, L_ST = 0.8, L_AT = 0.3, L_PCR = 0.002, beta = 10 (methods.md, 4.6)."""
    rows, wrong, y = 128, 9, 3
    clean, adversarial, teacher = [], [], []
    for i in range(rows):
        near, far = _row(y, 0.8 if i < wrong else 0.3)
        clean.append(near if i < wrong else far)
        adversarial.append(far if i < wrong else near)
        sure = np.zeros(10)  # certain to 1e-25: the KL to it is the student's -log p of the label after the exchange
        sure[7 if i < wrong else y] = 60.0
        teacher.append(sure)
    x, x_adv = picture(np.array(clean), np.array(teacher)), picture(np.array(adversarial), np.array(teacher))
    method = make("dgad", beta=10, kl_scale=kl_scale, variant=variant)
    loss, terms = method.loss(readers(10), Batch(x, torch.full((rows,), y), x_adv), None, CLOCK)
    assert loss.item() == pytest.approx(expected, abs=5e-6)
    assert terms["kl_clean"].item() == pytest.approx(0.8 * wrong / rows, rel=1e-6)
    assert terms["kl_adv"].item() == pytest.approx(0.3 * (rows - wrong) / rows, rel=1e-6)
    assert terms["pcr"].item() == pytest.approx(0.002, rel=1e-6)
    assert terms["teacher_wrong"].item() == pytest.approx(wrong / rows)
