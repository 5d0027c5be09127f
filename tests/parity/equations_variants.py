"""Options of AdaAD, DGAD and RSLAD in float64 NumPy from methods.md 4.3, 4.5, 4.6 and 1.2: AdaIAD, what the released
code computes, the parts of DGAD's ablation. Row by row and without any of robustkd's code; see `equations`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.parity.equations import Array, Case, Outer, adaad, kl_row, log_softmax


def rslad_as_coded(case: Case) -> Outer:
    """4.3 with the soft floor: entries -p log q + p log(p + 1e-5), mean over B * C."""
    rows, classes = case.shape
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        p = np.exp(log_softmax(case.t[i]))
        for weight, student, grad in ((5 / 6, case.a[i], grad_a), (1 / 6, case.s[i], grad_s)):
            log_q = log_softmax(student)
            value += weight * float((-p * log_q + p * np.log(p + 1e-5)).sum())
            grad[i] = weight * (np.exp(log_q) - p)
    over = 1 / (rows * classes)
    return Outer(value * over, grad_s * over, grad_a * over)


def adaiad(case: Case, *, tau: float = 30.0, beta: float = 0.1, gated: bool = False, weighted: bool = False) -> Outer:
    """4.5: tau^2 bmean KL_tau(T(x') || S(x')) + (1/B) sum (1 - w) KL(S(x) || S(x')), w = pT(y|x')^beta; S(x) live."""
    rows, _ = case.shape
    value, grad_s, grad_a = 0.0, np.zeros_like(case.s), np.zeros_like(case.a)
    for i in range(rows):
        trust = np.exp(beta * log_softmax(case.u[i])[case.y[i]])
        teacher, _, d_teacher = kl_row(case.u[i] / tau, case.a[i] / tau)
        scale = tau**2 * (trust if weighted and not gated else 1.0)
        value += scale * teacher
        grad_a[i] += scale * d_teacher / tau
        if not gated:
            own, d_own, d_student = kl_row(case.s[i], case.a[i])
            value += (1 - trust) * own
            grad_s[i], grad_a[i] = (1 - trust) * d_own, grad_a[i] + (1 - trust) * d_student
    return Outer(value / rows, grad_s / rows, grad_a / rows)


def repair(teacher: Array, y: int, how: str, share: float) -> Array:
    """The log-probabilities of one wrong row after ELS or one of its alternatives."""
    if how == "swap":
        swapped = teacher.copy()
        top = int(teacher.argmax())
        swapped[[y, top]] = swapped[[top, y]]
        return log_softmax(swapped)
    rest = np.exp(log_softmax(teacher)) if how == "mix" else np.full(len(teacher), 1 / len(teacher))
    log_rest = log_softmax(teacher) if how == "mix" else np.log(rest)
    target = np.log(share) + log_rest
    target[y] = np.log(1 - share + share * rest[y])
    return target


def dgad(
    case: Case,
    *,
    beta: float = 5.0,
    kl_scale: float = 1.0,
    partition: bool = True,
    swap_clean: bool = True,
    swap_adversarial: bool = True,
    how: str = "swap",
    share: float = 0.1,
    nominal: int | None = None,
    attack_right_rows: bool = False,
) -> Outer:
    """4.6; `nominal` is the released formula with this bs, `attack_right_rows` the paper's reading."""
    rows, classes = case.shape
    st, at, pcr = 0.0, 0.0, 0.0
    grad_st, grad_at, pcr_s, pcr_a = (np.zeros_like(case.s) for _ in range(4))
    wrong = [partition and int(case.t[i].argmax()) != case.y[i] for i in range(rows)]
    for i in range(rows):
        y, clean, adversarial = int(case.y[i]), case.t[i], case.u[i]
        if wrong[i]:
            target = repair(clean, y, how, share) if swap_clean else clean
            value, _, grad_st[i] = kl_row(target, case.s[i])
            st += value
        else:
            rest = max(adversarial[c] for c in range(classes) if c != y)
            target = repair(adversarial, y, how, share) if swap_adversarial and adversarial[y] < rest else adversarial
            value, _, grad_at[i] = kl_row(target, case.a[i])
            at += value
        if wrong[i] and attack_right_rows:
            continue
        p, q = np.exp(log_softmax(case.s[i])), np.exp(log_softmax(case.a[i]))
        down = 2 * (q - p)
        pcr += float(((q - p) ** 2).sum())
        pcr_a[i], pcr_s[i] = q * (down - q @ down), -p * (down - p @ down)
    weight = beta / (rows * classes)
    value, by_st, by_at = _join(st, at, sum(wrong), rows, kl_scale=kl_scale, nominal=nominal)
    return Outer(value + weight * pcr, by_st * grad_st + weight * pcr_s, by_at * grad_at + weight * pcr_a)


def _join(st: float, at: float, n1: int, rows: int, *, kl_scale: float, nominal: int | None) -> tuple[float, float, float]:
    """The distillation terms from their sums, and how the value moves with each sum."""
    if nominal is None:
        return kl_scale * (st + at) / rows, kl_scale / rows, kl_scale / rows
    per_st, per_at = 1 / (n1 + 1e-10), 1 / (rows - n1) if n1 < rows else 0.0
    a, b = n1 / nominal, (nominal - n1) / nominal
    mean_st, mean_at = per_st * st, per_at * at
    if kl_scale == 1:
        return a * mean_st + b * mean_at, a * per_st, b * per_at
    return kl_scale * (a * mean_st + b) * mean_at, kl_scale * a * per_st * mean_at, kl_scale * (a * mean_st + b) * per_at


OUTER: dict[str, tuple[str, dict[str, Any], Callable[[Case], Outer]]] = {
    "rslad, as coded": ("rslad", {"variant": "code"}, rslad_as_coded),
    "adaad, one formula": ("adaad", {"variant": "paper"}, lambda c: adaad(c, reduction="bmean")),
    "adaiad, first epochs": ("adaad", {"introspection": True}, lambda c: adaiad(c, gated=True)),
    "adaiad": ("adaad", {"introspection": True, "gate_epoch": 0}, adaiad),
    "adaiad, other knobs": (
        "adaad",
        {"introspection": True, "gate_epoch": 0, "tau": 2, "beta": 0.5},
        lambda c: adaiad(c, tau=2.0, beta=0.5),
    ),
    "adaiad, as in IAD's paper": (
        "adaad",
        {"introspection": True, "gate_epoch": 0, "variant": "paper"},
        lambda c: adaiad(c, weighted=True),
    ),
    "adaiad, as in IAD's paper, first epochs": (
        "adaad",
        {"introspection": True, "weight_teacher_term": True},
        lambda c: adaiad(c, gated=True, weighted=True),
    ),
    "dgad, full batch as coded": ("dgad", {"variant": "code", "batch_size": 8}, lambda c: dgad(c, nominal=8)),
    "dgad, short batch as coded": ("dgad", {"variant": "code"}, lambda c: dgad(c, nominal=128)),
    "dgad, MobileNetV2 as coded": (
        "dgad",
        {"variant": "code", "kl_scale": 0.5, "beta": 10},
        lambda c: dgad(c, nominal=128, kl_scale=0.5, beta=10.0),
    ),
    "dgad, paper": ("dgad", {"variant": "paper"}, lambda c: dgad(c, attack_right_rows=True)),
    "dgad, smoothing": ("dgad", {"repair": "smooth"}, lambda c: dgad(c, how="smooth")),
    "dgad, mixing": ("dgad", {"repair": "mix", "repair_share": 0.4}, lambda c: dgad(c, how="mix", share=0.4)),
}

#: DGAD's ablation (9.2): the parts that each row has
ABLATION = {
    "base": (),
    "MAP": ("partition",),
    "MAP PCR": ("partition", "pcr"),
    "ELS(x')": ("swap_adversarial",),
    "MAP ELS(x')": ("partition", "swap_adversarial"),
    "MAP ELS(x)": ("partition", "swap_clean"),
    "MAP ELS(x, x')": ("partition", "swap_clean", "swap_adversarial"),
    "all": ("partition", "swap_clean", "swap_adversarial", "pcr"),
}
PARTS = ("partition", "swap_clean", "swap_adversarial", "pcr")


def _ablated(has: tuple[str, ...]) -> Callable[[Case], Outer]:
    switches = {part: part in has for part in PARTS if part != "pcr"}
    return lambda c: dgad(c, beta=5.0 if "pcr" in has else 0.0, **switches)


OUTER |= {
    f"dgad, ablation: {row}": ("dgad", {part: part in has for part in PARTS}, _ablated(has)) for row, has in ABLATION.items()
}
