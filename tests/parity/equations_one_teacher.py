"""MART, ARD, IAD in its three forms, AKD and KD in float64 NumPy, row by row, from the papers' equations.

As `equations.py`, whose cross entropy and KL rows these use. Derivatives of what is new are in closed form:

    d KL(softmax(r / tau) || softmax(z / tau)) / dz   = (softmax(z / tau) - softmax(r / tau)) / tau
    d f(softmax(z)) / dz                              = p * (f' - p . f')

A teacher's logits at x are t, at x' u; the second teacher of IAD-II is given apart, and reads as the first by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.parity.equations import Array, Case, Inner, Outer, ce_row, inner_label, kl_row, log_softmax


def tempered(reference: Array, z: Array, tau: float) -> tuple[float, Array]:
    """tau^2 KL at temperature tau, and its gradient in z."""
    value, _, grad = kl_row(reference / tau, z / tau)
    return tau**2 * value, tau * grad


def through_softmax(p: Array, down: Array) -> Array:
    """The gradient in the logits of a function with the gradient `down` in the probabilities p."""
    grad: Array = p * (down - p @ down)
    return grad


def mart(case: Case, beta: float = 5.0) -> Outer:
    """3.3: BCE + beta KL (1.0000001 - p_y); gradient through the weight, and through both sides of the KL."""
    rows, classes = case.shape
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        y = int(case.y[i])
        p, q = np.exp(log_softmax(case.s[i])), np.exp(log_softmax(case.a[i]))
        k = max((c for c in range(classes) if c != y), key=lambda c: float(case.a[i][c]))
        ce, d_ce = ce_row(case.a[i], y)
        room = 1.0001 - q[k] + 1e-12
        gap = float((p * (log_softmax(case.s[i]) - np.log(q + 1e-12))).sum())
        weight = 1.0000001 - p[y]
        value += ce - np.log(room) + beta * gap * weight
        d_boost = np.zeros(classes)
        d_boost[k] = 1 / room
        grad_a[i] = d_ce + through_softmax(q, d_boost) + beta * weight * through_softmax(q, -p / (q + 1e-12))
        # p log p has the derivative log p + 1, and the 1 falls out of p * (f' - p . f')
        d_p = weight * (log_softmax(case.s[i]) - np.log(q + 1e-12))
        d_p[y] -= gap
        grad_s[i] = beta * through_softmax(p, d_p)
    return Outer(value / rows, grad_s / rows, grad_a / rows)


def ard(case: Case, *, alpha: float = 1.0, tau: float = 30.0, reduction: str = "emean", teacher_input: str = "clean") -> Outer:
    """4.1: alpha tau^2 emean KL_tau(T(x) || S(x')) + (1 - alpha) mean CE(S(x), y)."""
    rows, classes = case.shape
    over = rows * (classes if reduction == "emean" else 1)
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        taught, d_taught = tempered((case.t if teacher_input == "clean" else case.u)[i], case.a[i], tau)
        ce, d_ce = ce_row(case.s[i], case.y[i])
        value += alpha * taught / over + (1 - alpha) * ce / rows
        grad_a[i], grad_s[i] = alpha * d_taught / over, (1 - alpha) * d_ce / rows
    return Outer(value, grad_s, grad_a)


def iad_1(
    case: Case, *, gated: bool, alpha: float = 1.0, tau: float = 1.0, beta: float = 0.1, weigh_teacher: bool = False
) -> Outer:
    """4.2: alpha tau^2 bmean KL_tau(T(x) || S(x')) + (1 - alpha) CE(S(x), y), and past the gate

    + alpha mean (1 - w) KL(S(x) || S(x')), w = pT(y | x')^beta; S(x) is live.
    """
    rows, _ = case.shape
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        w = float(np.exp(log_softmax(case.u[i])[case.y[i]]) ** beta) if gated else 1.0
        taught, d_taught = tempered(case.t[i], case.a[i], tau)
        share = w if weigh_teacher else 1.0
        own, d_clean, d_adversarial = kl_row(case.s[i], case.a[i])
        ce, d_ce = ce_row(case.s[i], case.y[i])
        value += alpha * (share * taught + (1 - w) * own) + (1 - alpha) * ce
        grad_a[i] = alpha * (share * d_taught + (1 - w) * d_adversarial)
        grad_s[i] = alpha * (1 - w) * d_clean + (1 - alpha) * d_ce
    return Outer(value / rows, grad_s / rows, grad_a / rows)


def iad_2(
    case: Case,
    *,
    gated: bool,
    a1: float = 0.5,
    a2: float = 0.25,
    tau: float = 1.0,
    beta: float = 0.1,
    weigh_teacher: bool = True,
    second: Array | None = None,
) -> Outer:
    """4.2: (1 - a1 - a2) CE(S(x'), y) + a1 tau^2 [ w KL_tau(T(x') || S(x')) + (1 - w) KL(S(x) || S(x')) ]

    + a2 tau^2 KL_tau(T_st(x') || S(x')); before the gate, and in AKD2 always, w = 1. `second` is T_st(x').
    """
    rows, _ = case.shape
    other = case.u if second is None else second
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        w = float(np.exp(log_softmax(case.u[i])[case.y[i]]) ** beta) if gated else 1.0
        ce, d_ce = ce_row(case.a[i], case.y[i])
        taught, d_taught = tempered(case.u[i], case.a[i], tau)
        natural, d_natural = tempered(other[i], case.a[i], tau)
        own, d_clean, d_adversarial = kl_row(case.s[i], case.a[i])
        share, left = w if weigh_teacher else 1.0, tau**2 * (1 - w)
        value += (1 - a1 - a2) * ce + a1 * (share * taught + left * own) + a2 * natural
        grad_a[i] = (1 - a1 - a2) * d_ce + a1 * (share * d_taught + left * d_adversarial) + a2 * d_natural
        grad_s[i] = a1 * left * d_clean
    return Outer(value / rows, grad_s / rows, grad_a / rows)


def akd(case: Case, *, alpha: float = 0.5, teacher_input: str = "adversarial") -> Outer:
    """4.7: -(1/B) sum q log pS(x'), q = alpha softmax T(x') + (1 - alpha) onehot(y)."""
    rows, classes = case.shape
    value, grad_a = 0.0, np.zeros_like(case.a)
    for i in range(rows):
        log_p = log_softmax(case.a[i])
        teacher = (case.u if teacher_input == "adversarial" else case.t)[i]
        q = alpha * np.exp(log_softmax(teacher)) + (1 - alpha) * np.eye(classes)[case.y[i]]
        value -= float((q * log_p).sum())
        grad_a[i] = np.exp(log_p) - q
    return Outer(value / rows, np.zeros_like(case.s), grad_a / rows)


def kd(case: Case, *, alpha: float = 0.9, tau: float = 4.0) -> Outer:
    """Hinton et al. 2015: alpha tau^2 bmean KL_tau(T(x) || S(x)) + (1 - alpha) mean CE(S(x), y)."""
    rows, _ = case.shape
    value, grad_s = 0.0, np.zeros_like(case.s)
    for i in range(rows):
        taught, d_taught = tempered(case.t[i], case.s[i], tau)
        ce, d_ce = ce_row(case.s[i], case.y[i])
        value += alpha * taught + (1 - alpha) * ce
        grad_s[i] = alpha * d_taught + (1 - alpha) * d_ce
    return Outer(value / rows, grad_s / rows, np.zeros_like(case.a))


#: id -> method, its knobs, the equation; the gate of IAD is moved by its knob, as all tests run in epoch 0
OUTER: dict[str, tuple[str, dict[str, Any], Callable[[Case], Outer]]] = {
    "mart": ("mart", {}, mart),
    "mart, WRN-34-10": ("mart", {"beta": 6}, lambda c: mart(c, 6.0)),
    "mart, beta 0": ("mart", {"beta": 0}, lambda c: mart(c, 0.0)),
    "ard": ("ard", {}, ard),
    "ard without the clean pass": ("ard", {"clean_bn_pass": False}, ard),
    "ard, alpha 0.4": ("ard", {"alpha": 0.4, "clean_bn_pass": False}, lambda c: ard(c, alpha=0.4)),
    "ard, alpha 0": ("ard", {"alpha": 0}, lambda c: ard(c, alpha=0.0)),
    "ard, as ported": ("ard", {"tau": 1, "reduction": "bmean"}, lambda c: ard(c, tau=1.0, reduction="bmean")),
    "ard, teacher at x'": ("ard", {"teacher_input": "adversarial"}, lambda c: ard(c, teacher_input="adversarial")),
    "iad-1 before the gate": ("iad", {}, lambda c: iad_1(c, gated=False)),
    "iad-1": ("iad", {"gate_epoch": 0}, lambda c: iad_1(c, gated=True)),
    "iad-1 before the gate, weighted": ("iad", {"weight_teacher_term": True}, lambda c: iad_1(c, gated=False)),
    "iad-1, weighted": (
        "iad",
        {"gate_epoch": 0, "weight_teacher_term": True},
        lambda c: iad_1(c, gated=True, weigh_teacher=True),
    ),
    "iad-1, other knobs": (
        "iad",
        {"gate_epoch": 0, "alpha": 0.7, "tau": 5, "beta": 0.8},
        lambda c: iad_1(c, gated=True, alpha=0.7, tau=5.0, beta=0.8),
    ),
    "iad-1 before the gate, alpha 0.7": (
        "iad",
        {"alpha": 0.7, "tau": 5, "clean_bn_pass": False},
        lambda c: iad_1(c, gated=False, alpha=0.7, tau=5.0),
    ),
    "iad-2 before the gate": ("iad", {"form": "iad-2"}, lambda c: iad_2(c, gated=False)),
    "iad-2": ("iad", {"form": "iad-2", "gate_epoch": 0}, lambda c: iad_2(c, gated=True)),
    "iad-2, unweighted": (
        "iad",
        {"form": "iad-2", "gate_epoch": 0, "weight_teacher_term": False},
        lambda c: iad_2(c, gated=True, weigh_teacher=False),
    ),
    "iad-2, other knobs": (
        "iad",
        {"form": "iad-2", "gate_epoch": 0, "alpha_robust": 0.2, "alpha_clean": 0.7, "tau": 3, "beta": 0.8},
        lambda c: iad_2(c, gated=True, a1=0.2, a2=0.7, tau=3.0, beta=0.8),
    ),
    "akd2": ("iad", {"form": "akd2"}, lambda c: iad_2(c, gated=False)),
    "akd2, other knobs": (
        "iad",
        {"form": "akd2", "alpha_robust": 0.3, "alpha_clean": 0.3, "tau": 2},
        lambda c: iad_2(c, gated=False, a1=0.3, a2=0.3, tau=2.0),
    ),
    "akd": ("akd", {}, akd),
    "akd, alpha 0": ("akd", {"alpha": 0}, lambda c: akd(c, alpha=0.0)),
    "akd, alpha 1": ("akd", {"alpha": 1, "clean_bn_pass": False}, lambda c: akd(c, alpha=1.0)),
    "akd, teacher at x": ("akd", {"teacher_input": "clean"}, lambda c: akd(c, teacher_input="clean")),
    "kd": ("kd", {}, kd),
    "kd, other knobs": ("kd", {"alpha": 0.3, "tau": 20}, lambda c: kd(c, alpha=0.3, tau=20.0)),
}
INNER: dict[str, Callable[[Case], Inner]] = dict.fromkeys(("mart", "ard", "iad", "akd", "kd"), inner_label)
