"""B-MTARD: MTARD whose teachers are brought to the same entropy by temperatures, so that neither dominates.

Zhao et al., "Mitigating Accuracy-Robustness Trade-off via Balanced Multi-Teacher Adversarial Distillation", TPAMI 2024
(methods.md, 5.2). In each step, in this order:

1. x' by the label attack; logits a = T_adv(x'), n = T_nat(x).
2. P_a = softmax(a / tau_adv), P_n = softmax(n / tau_nat); the student stays at temperature 1.
3. L_adv = KL(P_a || S(x')), L_nat = KL(P_n || S(x)); no tau^2 factor.
4. Entropy-based balance, with the entropies of step 2: tau_adv <- clip(tau_adv - mu sign(H_a / H_n - 1), 1, 10),
   tau_nat <- clip(tau_nat - mu sign(H_n / H_a - 1), 1, 10); they take effect in the next step.
5. Normalisation loss balance, as MTARD with b = 1.
6. loss = w_adv L_adv + w_nat L_nat: new weights, losses of step 3.

`mu` and `eta` follow the learning rate.

Departures: exact KL and entropies instead of the released code's 1e-5 inside the logarithms, which reaches weights and
temperatures (`variant: code` has it), so H_a > H_n is asked instead of H_a / H_n > 1; a loss below 1e-5 counts as 1e-5 in
step 5; losses and entropies are averaged over all processes first. The released folder lacks its loss and data helpers:
the attack is MTARD's. The paper's own form of step 4 could not be read; the sign update is the code's. Settings other
than ResNet-18 on CIFAR-10 are not verified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, cross_entropy, full, reduce
from robustkd.methods._balance import LEAST, Balance, numbers
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms
from robustkd.methods._floor import Variant, disorder, divergence

TAU_MIN, TAU_MAX = 1.0, 10.0


class BMtardConfig(MethodConfig, frozen=True):
    """Knobs of B-MTARD."""

    name: Literal["b-mtard"] = "b-mtard"
    variant: Variant = Field("fixed", description="code: losses and entropies with the released code's 1e-5 floor")
    eta: float = Field(0.025, ge=0, le=1, description="step of the loss weights; multiplied by lr over its first value")
    mu: float = Field(0.001, ge=0, description="step of the temperatures; multiplied by lr over its first value")
    reduction: Reduction = Field("emean", description="emean (code, CIFAR-10); on CIFAR-100 emean with scale 10")
    scale: float = Field(1.0, gt=0, description="multiplies the loss; 10 on CIFAR-100")


@dataclass(frozen=True)
class Tempered(Balance):
    """Loss weights, first losses, and the teachers' temperatures for the next step."""

    tau_adv: float = TAU_MIN
    tau_nat: float = TAU_MIN


class BMtard(Method[BMtardConfig, Tempered]):
    """Balanced multi-teacher adversarial distillation."""

    summary = "MTARD with teacher temperatures that bring both teachers to the same entropy"
    paper = "Zhao et al., TPAMI 2024"
    equation = (
        "inner: max CE(S(x'), y)    outer: w_adv KL(T_adv(x')/tau_adv || S(x')) + w_nat KL(T_nat(x)/tau_nat || S(x)), "
        "w by NLB, tau by EBB"
    )
    departures = "exact KL and entropies instead of the code's 1e-5 floor (variant: code has it); MTARD's attack"
    roles = ("robust", "clean")
    Config = BMtardConfig

    def init(self) -> Tempered:
        """Both weights one half, both temperatures one, no first batch yet."""
        return Tempered()

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y); no teacher takes part."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: Tempered, clock: Clock) -> tuple[Tensor, Terms]:
        """The parts (L_adv, L_nat) and the teachers' mean entropies; passes: adversarial, then clean."""
        a = full(fixed(nets.robust, batch.x_adv)) / state.tau_adv
        n = full(fixed(nets.teachers["clean"], batch.x)) / state.tau_nat
        variant = self.config.variant
        adversarial = self._mean(batch.weighted(divergence(a, nets.student(batch.x_adv), variant)))
        clean = self._mean(divergence(n, nets.student(batch.x), variant))
        found = terms(
            kl_adv=adversarial,
            kl_clean=clean,
            entropy_adv=disorder(a, variant).mean(),
            entropy_nat=disorder(n, variant).mean(),
        )
        return torch.stack([adversarial, clean]), found

    def advance(self, state: Tempered, terms: Terms, clock: Clock) -> Tempered:
        """EBB, then NLB."""
        adv, nat, h_adv, h_nat = numbers(terms, "kl_adv", "kl_clean", "entropy_adv", "entropy_nat")
        mu, eta = self.config.mu * clock.lr_scale, self.config.eta * clock.lr_scale
        state = replace(
            state,
            tau_adv=_clip(state.tau_adv - mu * self._sign(h_adv, h_nat)),
            tau_nat=_clip(state.tau_nat - mu * self._sign(h_nat, h_adv)),
        )
        return state.balanced(adv, nat, eta=eta, least=LEAST * self.config.scale)

    def weigh(self, parts: Tensor, state: Tempered) -> Tensor:
        """w_adv L_adv + w_nat L_nat, with the weights this batch led to."""
        return state.join(parts)

    def gauges(self, state: Tempered) -> dict[str, float]:
        """Weights of this step, temperatures of the next."""
        return {**state.weights(), "tau_adv": state.tau_adv, "tau_nat": state.tau_nat}

    def save(self, state: Tempered) -> dict[str, Any]:
        """Weights, first losses and temperatures."""
        return state.save()

    def restore(self, saved: dict[str, Any]) -> Tempered:
        """Weights, first losses and temperatures back."""
        return Tempered(**saved)

    def _sign(self, ours: float, other: float) -> int:
        """The sign of ours / other - 1; with exact entropies, which are never negative, that of ours - other."""
        if self.config.variant == "code" and other != 0:
            ours, other = ours / other, 1.0
        return (ours > other) - (ours < other)

    def _mean(self, per_image: Tensor) -> Tensor:
        return self.config.scale * reduce(per_image, self.config.reduction, classes=self.classes)


def _clip(tau: float) -> float:
    return min(max(tau, TAU_MIN), TAU_MAX)


ENTRY = BMtard
