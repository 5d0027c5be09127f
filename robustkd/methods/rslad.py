"""RSLAD: soft labels of the robust teacher on clean images guide both inner and outer problem.

Zi et al., "Revisiting Adversarial Robustness Distillation", ICCV 2021 (methods.md, 4.3).

Departures: exact KL instead of the released code's 1e-5 floor inside the teacher's logarithm, which `variant: code` has;
the gradient in the student is the same, so the two differ in the logged loss only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, kl, reduce
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms
from robustkd.methods._floor import Variant, divergence


class RsladConfig(MethodConfig, frozen=True):
    """Knobs of RSLAD."""

    name: Literal["rslad"] = "rslad"
    variant: Variant = Field("fixed", description="code: loss values with the released code's 1e-5 floor (same gradient)")
    adversarial_weight: float = Field(5 / 6, ge=0, le=1, description="weight of the adversarial term")
    reduction: Reduction = Field("emean", description="emean (code, CIFAR-10); on CIFAR-100 emean with scale 10")
    scale: float = Field(1.0, gt=0, description="multiplies the loss; 10 on CIFAR-100")


class Rslad(Method[RsladConfig, None]):
    """Robust soft label adversarial distillation."""

    summary = "the robust teacher's clean predictions replace every label"
    paper = "Zi et al., ICCV 2021"
    equation = "t = T(x)    inner: max KL(t || S(x'))    outer: 5/6 KL(t || S(x')) + 1/6 KL(t || S(x))"
    departures = "exact KL instead of the code's 1e-5 floor (variant: code has it; same gradient)"
    roles = ("robust",)
    labels = False
    Config = RsladConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(T(x) || S(x')); the teacher looks at the clean image once."""
        target = fixed(nets.robust, x)
        return lambda x_adv: kl(target, nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x)); passes: adversarial, then clean."""
        target = fixed(nets.robust, batch.x)
        variant = self.config.variant
        adversarial = self._mean(batch.weighted(divergence(target, nets.student(batch.x_adv), variant)))
        clean = self._mean(divergence(target, nets.student(batch.x), variant))
        weight = self.config.adversarial_weight
        return weight * adversarial + (1 - weight) * clean, terms(kl_adv=adversarial, kl_clean=clean)

    def _mean(self, per_image: Tensor) -> Tensor:
        return self.config.scale * reduce(per_image, self.config.reduction, classes=self.classes)


ENTRY = Rslad
