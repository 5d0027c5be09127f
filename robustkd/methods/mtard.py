"""MTARD: a clean teacher teaches clean images, a robust teacher adversarial ones; weights follow both losses' progress.

Zhao et al., "Enhanced Accuracy and Robustness via Multi-Teacher Adversarial Distillation", ECCV 2022 (methods.md, 5.1).
Once per batch, with the losses of that very batch: l_k = L_k / L0_k (L0: the run's first batch), r_nat = l_nat^b /
(l_nat^b + l_adv^b), w_nat <- w_nat - eta (w_nat - r_nat), w_adv = 1 - w_nat; the new weights are used at once. `eta`
follows the learning rate.

Departures: exact KL instead of the released code's 1e-5 floor inside the teachers' logarithms, which reaches the
weights through the ratios l_k (`variant: code` has the floor); a loss below 1e-5 counts as 1e-5 there, so that a student
which starts as a copy of a teacher divides nothing by zero; losses are averaged over all processes first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, cross_entropy, reduce
from robustkd.methods._balance import LEAST, Balance, numbers
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms
from robustkd.methods._floor import Variant, divergence


class MtardConfig(MethodConfig, frozen=True):
    """Knobs of MTARD."""

    name: Literal["mtard"] = "mtard"
    variant: Variant = Field("fixed", description="code: losses with the released code's 1e-5 floor (same gradient)")
    eta: float = Field(0.025, ge=0, le=1, description="step of the loss weights; multiplied by lr over its first value")
    b: float = Field(1.0, ge=0, description="exponent of the loss ratios")
    reduction: Reduction = Field("emean", description="emean (code, CIFAR-10); on CIFAR-100 emean with scale 10")
    scale: float = Field(1.0, gt=0, description="multiplies the loss; 10 on CIFAR-100")


class Mtard(Method[MtardConfig, Balance]):
    """Multi-teacher adversarial robustness distillation."""

    summary = "clean teacher on clean images, robust teacher on adversarial ones, weights by progress"
    paper = "Zhao et al., ECCV 2022"
    equation = "inner: max CE(S(x'), y)    outer: w_adv KL(T_adv(x') || S(x')) + w_nat KL(T_nat(x) || S(x)), w by NLB"
    departures = "exact KL instead of the code's 1e-5 floor (variant: code has it); losses under 1e-5 count as 1e-5 in NLB"
    roles = ("robust", "clean")
    Config = MtardConfig

    def init(self) -> Balance:
        """Both weights one half, no first batch yet."""
        return Balance()

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y); no teacher takes part."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: Balance, clock: Clock) -> tuple[Tensor, Terms]:
        """The parts (L_adv, L_nat); passes: adversarial, then clean."""
        teacher_adv, teacher_nat = fixed(nets.robust, batch.x_adv), fixed(nets.teachers["clean"], batch.x)
        variant = self.config.variant
        adversarial = self._mean(batch.weighted(divergence(teacher_adv, nets.student(batch.x_adv), variant)))
        clean = self._mean(divergence(teacher_nat, nets.student(batch.x), variant))
        return torch.stack([adversarial, clean]), terms(kl_adv=adversarial, kl_clean=clean)

    def advance(self, state: Balance, terms: Terms, clock: Clock) -> Balance:
        """NLB."""
        adv, nat = numbers(terms, "kl_adv", "kl_clean")
        eta, least = self.config.eta * clock.lr_scale, LEAST * self.config.scale
        return state.balanced(adv, nat, eta=eta, b=self.config.b, least=least)

    def weigh(self, parts: Tensor, state: Balance) -> Tensor:
        """w_adv L_adv + w_nat L_nat, with the weights this batch led to."""
        return state.join(parts)

    def gauges(self, state: Balance) -> dict[str, float]:
        """Both weights."""
        return state.weights()

    def save(self, state: Balance) -> dict[str, Any]:
        """Weights and first losses."""
        return state.save()

    def restore(self, saved: dict[str, Any]) -> Balance:
        """Weights and first losses back."""
        return Balance(**saved)

    def _mean(self, per_image: Tensor) -> Tensor:
        return self.config.scale * reduce(per_image, self.config.reduction, classes=self.classes)


ENTRY = Mtard
