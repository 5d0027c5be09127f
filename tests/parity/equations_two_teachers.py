"""MTARD and B-MTARD in float64 NumPy from methods.md 5.1 and 5.2: loss, gradient, and the state over several steps.

Row by row and without any of robustkd's code; the first batch of a run unless a state is given. In a `Case` the robust
teacher is read at x' (u) and the clean one at x (t). See `equations` for the closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.parity.equations import Array, Case, Outer, log_softmax


@dataclass(frozen=True)
class State:
    """Loss weights, temperatures, and the losses of the first batch (0 before it)."""

    w_adv: float = 0.5
    w_nat: float = 0.5
    tau_adv: float = 1.0
    tau_nat: float = 1.0
    first_adv: float = 0.0
    first_nat: float = 0.0


def _kl(teacher: Array, student: Array, tau: float, floor: float) -> tuple[float, Array]:
    """KL of the tempered teacher from the student at temperature 1, and its gradient in the student's logits."""
    log_p, log_q = log_softmax(teacher / tau), log_softmax(student)
    p = np.exp(log_p)
    reference = np.log(p + floor) if floor else log_p
    return float((p * (reference - log_q)).sum()), np.exp(log_q) - p


def _entropy_mean(teacher: Array, tau: float, floor: float) -> float:
    """The mean over B * C of P log(P + floor): negative."""
    log_p = np.stack([log_softmax(row / tau) for row in teacher])
    p = np.exp(log_p)
    return float((p * (np.log(p + floor) if floor else log_p)).mean())


def losses(case: Case, state: State, *, floor: float, scale: float) -> tuple[float, float, Array, Array]:
    """L_adv and L_nat as the mean over B * C entries, times scale, with gradients in a and s."""
    rows, classes = case.shape
    adv, grad_a = zip(*[_kl(u, a, state.tau_adv, floor) for u, a in zip(case.u, case.a, strict=True)], strict=True)
    nat, grad_s = zip(*[_kl(t, s, state.tau_nat, floor) for t, s in zip(case.t, case.s, strict=True)], strict=True)
    over = scale / (rows * classes)
    return sum(adv) * over, sum(nat) * over, np.stack(grad_a) * over, np.stack(grad_s) * over


def nlb(state: State, adv: float, nat: float, *, eta: float, b: float, least: float) -> State:
    """5.1: the weights with the losses of this batch."""
    adv, nat = max(adv, least), max(nat, least)
    first_adv, first_nat = state.first_adv or adv, state.first_nat or nat
    l_adv, l_nat = (adv / first_adv) ** b, (nat / first_nat) ** b
    w_nat = state.w_nat - eta * (state.w_nat - l_nat / (l_nat + l_adv))
    return replace(state, w_nat=w_nat, w_adv=1 - w_nat, first_adv=first_adv, first_nat=first_nat)


def ebb(state: State, case: Case, *, mu: float, floor: float) -> State:
    """5.2, step 4: the temperatures of the next step from the entropies at the old ones."""
    h_a, h_n = _entropy_mean(case.u, state.tau_adv, floor), _entropy_mean(case.t, state.tau_nat, floor)
    # exact entropies may vanish, where only which of them is greater makes sense
    signs = (np.sign(h_a / h_n - 1), np.sign(h_n / h_a - 1)) if floor else (np.sign(h_n - h_a), np.sign(h_a - h_n))
    tau_adv, tau_nat = state.tau_adv - mu * signs[0], state.tau_nat - mu * signs[1]
    return replace(state, tau_adv=float(np.clip(tau_adv, 1, 10)), tau_nat=float(np.clip(tau_nat, 1, 10)))


def step(
    case: Case,
    state: State,
    *,
    tempered: bool,
    floor: float = 0.0,
    scale: float = 1.0,
    eta: float = 0.025,
    b: float = 1.0,
    mu: float = 0.001,
) -> tuple[Outer, State]:
    """One step of MTARD, or (tempered) of B-MTARD: what is differentiated, and the state of the next."""
    adv, nat, grad_a, grad_s = losses(case, state, floor=floor, scale=scale)
    if tempered:
        state = ebb(state, case, mu=mu, floor=floor)
    state = nlb(state, adv, nat, eta=eta, b=b, least=1e-5 * scale)
    return Outer(state.w_adv * adv + state.w_nat * nat, state.w_nat * grad_s, state.w_adv * grad_a), state


def mtard(case: Case, *, floor: float = 0.0, scale: float = 1.0) -> Outer:
    """The first step of a run."""
    return step(case, State(), tempered=False, floor=floor, scale=scale)[0]


def b_mtard(case: Case, *, floor: float = 0.0, scale: float = 1.0) -> Outer:
    """The first step of a run."""
    return step(case, State(), tempered=True, floor=floor, scale=scale)[0]
