"""AdaAD: find the point in the ball where student and teacher disagree most, and match there.

Huang et al., "Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation", CVPR 2023
(methods.md, 4.4). The inner gradient goes through the teacher.

Departures: none. The reduction follows the released code: emean on CIFAR-10, bmean on CIFAR-100 and Tiny-ImageNet,
that is emean up to ten classes and bmean above, unless `reduction` says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, kl, reduce
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class AdaadConfig(MethodConfig, frozen=True):
    """Knobs of AdaAD."""

    name: Literal["adaad"] = "adaad"
    alpha: float = Field(1.0, ge=0, le=1, description="weight of the adversarial term")
    reduction: Reduction | None = Field(None, description="left out: emean up to 10 classes, bmean above")
    clean_bn_pass: bool = Field(
        True, description="run the clean pass also at alpha 1: it has no weight but moves running statistics"
    )


class Adaad(Method[AdaadConfig, None]):
    """Adaptive adversarial distillation."""

    summary = "match the robust teacher where student and teacher disagree most"
    paper = "Huang et al., CVPR 2023"
    equation = "inner: max KL(T(x') || S(x'))    outer: a KL(T(x') || S(x')) + (1 - a) KL(T(x) || S(x)), a = 1"
    roles = ("robust",)
    through_teacher = True
    Config = AdaadConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(T(x') || S(x')); both sides move with x'."""
        return lambda x_adv: kl(nets.robust(x_adv), nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """Alpha KL at x' + (1 - alpha) KL at x; passes: clean, then adversarial."""
        alpha = self.config.alpha
        clean = batch.x.new_zeros(())
        if alpha < 1 or self.config.clean_bn_pass:
            clean = self._mean(kl(fixed(nets.robust, batch.x), nets.student(batch.x)))
        adversarial = self._mean(batch.weighted(kl(fixed(nets.robust, batch.x_adv), nets.student(batch.x_adv))))
        loss = alpha * adversarial + (1 - alpha) * clean if alpha < 1 else adversarial
        return loss, terms(kl_adv=adversarial, kl_clean=clean)

    def _mean(self, per_image: Tensor) -> Tensor:
        how = self.config.reduction or ("emean" if self.classes <= 10 else "bmean")
        return reduce(per_image, how, classes=self.classes)


ENTRY = Adaad
