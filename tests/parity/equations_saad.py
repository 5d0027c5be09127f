"""SAAD in float64 NumPy from methods.md 6.2 and 6.1, row by row and without any of robustkd's code; see `equations`.

On logits written in the image both networks are linear: the student says 2s - a at x - d, so dS = 2 (a - s); the
teacher's label logit has slope 1 in one pixel, so the correction of entry y is u_y - t_y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.parity.equations import Array, Case, Inner, Outer, kl_row, log_softmax


def saad(case: Case, *, alpha: float = 1.0, beta: float = 0.0, scale: float = 5.0) -> Outer:
    """6.2 in the last epoch, where epoch/E = 1."""
    rows, _ = case.shape
    entropies = np.array([-(np.exp(log_softmax(u)) * log_softmax(u)).sum() for u in case.u])
    w = scale * (entropies - entropies.min())
    wn = (w - w.min()) / (w.max() - w.min() + 1e-8)
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        adversarial, _, d_adversarial = kl_row(case.u[i], case.a[i])
        igdm, _, d_difference = kl_row(2 * (case.u[i] - case.t[i]), 2 * (case.a[i] - case.s[i]))
        clean, _, d_clean = kl_row(case.t[i], case.s[i])
        value += w[i] * (adversarial + alpha * igdm) + beta * (1 - wn[i]) * clean
        grad_a[i] = w[i] * (d_adversarial + 2 * alpha * d_difference)
        grad_s[i] = -2 * w[i] * alpha * d_difference + beta * (1 - wn[i]) * d_clean
    return Outer(value / rows, grad_s / rows, grad_a / rows)


def inner_saad(case: Case) -> Inner:
    """KL(softmax z || S(x')), z = T(x) but for entry y, which is T(x')_y here; only through it a gradient reaches u."""
    parts = [_row(case, i) for i in range(case.shape[0])]
    values, grad_a, grad_u = zip(*parts, strict=True)
    return Inner(np.array(values), np.stack(grad_a), np.stack(grad_u))


def _row(case: Case, i: int) -> tuple[float, Array, Array]:
    y, z = int(case.y[i]), case.t[i].copy()
    z[y] = case.u[i, y]
    value, d_teacher, d_student = kl_row(z, case.a[i])
    through = np.zeros_like(z)
    through[y] = d_teacher[y]
    return value, d_student, through


OUTER: dict[str, tuple[str, dict[str, Any], Callable[[Case], Outer]]] = {
    "saad": ("saad", {}, saad),
    "saad without IGDM": ("saad", {"alpha": 0}, lambda c: saad(c, alpha=0.0)),
    "saad with a clean term": ("saad", {"beta": 1.5, "alpha": 10}, lambda c: saad(c, beta=1.5, alpha=10.0)),
    "saad, scale 2": ("saad", {"scale": 2, "clean_bn_pass": False}, lambda c: saad(c, scale=2.0)),
}
INNER: dict[str, Callable[[Case], Inner]] = {"saad": inner_saad}
