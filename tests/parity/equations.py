"""Inner objectives and outer losses of every method, in float64 NumPy, from the papers' equations.

Row by row and without any of robustkd's code. Each outer loss returns its value and the gradient with respect to
the student's logits on clean (s) and adversarial (a) images; t and u are the teacher's logits there. Each inner
objective returns one value per image and the gradients with respect to the student's and the teacher's logits at
x'. Derivatives are in closed form:

    d CE(z, y) / dz          = p - onehot(y)
    d KL(p || q) / dz_q      = q - p
    d KL(p || q) / dz_p      = p * (log p - log q - KL)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """Logits (B, C) of the student on x (s) and x' (a), of the teacher on x (t) and x' (u), and labels (B,)."""

    s: Array
    a: Array
    t: Array
    u: Array
    y: Labels

    @property
    def shape(self) -> tuple[int, int]:
        rows, classes = self.s.shape
        return rows, classes


@dataclass(frozen=True)
class Outer:
    value: float
    grad_s: Array
    grad_a: Array


@dataclass(frozen=True)
class Inner:
    values: Array
    grad_a: Array
    grad_u: Array


def log_softmax(z: Array) -> Array:
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def ce_row(z: Array, y: int) -> tuple[float, Array]:
    log_p = log_softmax(z)
    grad = np.exp(log_p)
    grad[y] -= 1
    return -float(log_p[y]), grad


def kl_row(reference: Array, z: Array) -> tuple[float, Array, Array]:
    """KL(softmax(reference) || softmax(z)) and its gradients in reference and z."""
    log_p, log_q = log_softmax(reference), log_softmax(z)
    p, q = np.exp(log_p), np.exp(log_q)
    value = float((p * (log_p - log_q)).sum())
    return value, p * (log_p - log_q - value), q - p


def standard(case: Case) -> Outer:
    rows, _ = case.shape
    parts = [ce_row(z, y) for z, y in zip(case.s, case.y, strict=True)]
    return Outer(sum(v for v, _ in parts) / rows, np.stack([g for _, g in parts]) / rows, np.zeros_like(case.a))


def pgd_at(case: Case) -> Outer:
    """3.1: (1/B) sum CE(S(x'), y)."""
    rows, _ = case.shape
    parts = [ce_row(z, y) for z, y in zip(case.a, case.y, strict=True)]
    return Outer(sum(v for v, _ in parts) / rows, np.zeros_like(case.s), np.stack([g for _, g in parts]) / rows)


def trades(case: Case, beta: float = 6.0) -> Outer:
    """3.2: (1/B) sum CE(S(x), y) + beta (1/B) sum KL(S(x) || S(x')); the target is live."""
    rows, _ = case.shape
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        ce, d_ce = ce_row(case.s[i], case.y[i])
        kl, d_reference, d_student = kl_row(case.s[i], case.a[i])
        value += ce + beta * kl
        grad_s[i], grad_a[i] = d_ce + beta * d_reference, beta * d_student
    return Outer(value / rows, grad_s / rows, grad_a / rows)


def rslad(case: Case, *, reduction: str = "emean", scale: float = 1.0) -> Outer:
    """4.3: 5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x)), emean; CIFAR-100 times 10."""
    rows, classes = case.shape
    over = scale / (rows * (classes if reduction == "emean" else 1))
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        adversarial, _, d_adversarial = kl_row(case.t[i], case.a[i])
        clean, _, d_clean = kl_row(case.t[i], case.s[i])
        value += (5 * adversarial + clean) / 6
        grad_a[i], grad_s[i] = 5 * d_adversarial / 6, d_clean / 6
    return Outer(value * over, grad_s * over, grad_a * over)


def adaad(case: Case, *, alpha: float = 1.0, reduction: str) -> Outer:
    """4.4: alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x))."""
    rows, classes = case.shape
    over = 1 / (rows * (classes if reduction == "emean" else 1))
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        adversarial, _, d_adversarial = kl_row(case.u[i], case.a[i])
        clean, _, d_clean = kl_row(case.t[i], case.s[i])
        value += alpha * adversarial + (1 - alpha) * clean
        grad_a[i], grad_s[i] = alpha * d_adversarial, (1 - alpha) * d_clean
    return Outer(value * over, grad_s * over, grad_a * over)


def dgad(case: Case, *, beta: float = 5.0, kl_scale: float = 1.0) -> Outer:
    """4.6 with the real batch size: (1/B) [sum_ST KL(T~(x)||S(x)) + sum_AT KL(T~(x')||S(x'))] + beta L_PCR."""
    rows, classes = case.shape
    distil, pcr, grad_s, grad_a = 0.0, 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        y, clean_teacher, adversarial_teacher = int(case.y[i]), case.t[i].copy(), case.u[i].copy()
        top = int(clean_teacher.argmax())
        if top != y:  # an ST row: exchange label and largest logit of T(x), learn it on x
            clean_teacher[[y, top]] = clean_teacher[[top, y]]
            value, _, grad = kl_row(clean_teacher, case.s[i])
            grad_s[i] += kl_scale * grad / rows
        else:  # an AT row: exchange where the teacher errs at x', learn it on x'
            rest = [c for c in range(classes) if c != y]
            best = max(rest, key=lambda c: float(adversarial_teacher[c]))
            if adversarial_teacher[y] - adversarial_teacher[best] < 0:
                adversarial_teacher[[y, best]] = adversarial_teacher[[best, y]]
            value, _, grad = kl_row(adversarial_teacher, case.a[i])
            grad_a[i] += kl_scale * grad / rows
        distil += value
        p, q = np.exp(log_softmax(case.s[i])), np.exp(log_softmax(case.a[i]))
        pcr += float(((q - p) ** 2).sum())
        # d/dz of sum_c f_c(softmax(z)) is p * (f' - p.f')
        down_q, down_p = 2 * (q - p), -2 * (q - p)
        weight = beta / (rows * classes)
        grad_a[i] += weight * q * (down_q - q @ down_q)
        grad_s[i] += weight * p * (down_p - p @ down_p)
    return Outer(kl_scale * distil / rows + beta * pcr / (rows * classes), grad_s, grad_a)


def _inner(case: Case, row: Callable[[int], tuple[float, Array, Array]]) -> Inner:
    values, grad_a, grad_u = zip(*[row(i) for i in range(case.shape[0])], strict=True)
    return Inner(np.array(values), np.stack(grad_a), np.stack(grad_u))


def inner_label(case: Case) -> Inner:
    """CE(S(x'), y)."""

    def row(i: int) -> tuple[float, Array, Array]:
        value, grad = ce_row(case.a[i], case.y[i])
        return value, grad, np.zeros_like(grad)

    return _inner(case, row)


def inner_trades(case: Case) -> Inner:
    """KL(S(x) || S(x')), target fixed."""

    def row(i: int) -> tuple[float, Array, Array]:
        value, _, grad = kl_row(case.s[i], case.a[i])
        return value, grad, np.zeros_like(grad)

    return _inner(case, row)


def inner_rslad(case: Case) -> Inner:
    """KL(T(x) || S(x')), target fixed."""

    def row(i: int) -> tuple[float, Array, Array]:
        value, _, grad = kl_row(case.t[i], case.a[i])
        return value, grad, np.zeros_like(grad)

    return _inner(case, row)


def inner_adaad(case: Case) -> Inner:
    """KL(T(x') || S(x')), both sides live: J_S^T (pS - pT) + J_T^T (pT (log pT/pS - KL))."""

    def row(i: int) -> tuple[float, Array, Array]:
        value, d_teacher, d_student = kl_row(case.u[i], case.a[i])
        return value, d_student, d_teacher

    return _inner(case, row)
