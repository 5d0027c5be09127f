"""AdaAD: find the point in the ball where student and teacher disagree most, and match there.

Huang et al., "Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation", CVPR 2023
(methods.md, 4.4). The inner gradient goes through the teacher.

`introspection: true` is AdaIAD (4.5): AdaAD's attack with the weighting of IAD. Where the teacher errs at x', the student
follows its own clean prediction as well, from epoch `gate_epoch` on:

    tau^2 bmean KL_tau(T(x') || S(x')) + (1/B) sum_i (1 - w_i) KL(S(x) || S(x'))_i,   w_i = pT(y_i | x'_i)^beta

Departures: none from the released code (`variant: code`), which reduces by emean on CIFAR-10 and bmean on CIFAR-100 and
Tiny-ImageNet, that is emean up to ten classes and bmean above, and AdaIAD by bmean always. The paper has one formula for
all data sets: `variant: paper` is bmean everywhere, and AdaIAD's teacher term times w_i as in IAD's paper (our reading);
the code leaves that term unweighted. `reduction` and `weight_teacher_term` overrule both. AdaIAD has no clean teacher
term, so it keeps alpha 1.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, cross_entropy, kl, reduce
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class AdaadConfig(MethodConfig, frozen=True):
    """Knobs of AdaAD."""

    name: Literal["adaad"] = "adaad"
    variant: Literal["code", "paper"] = Field("code", description="whose reduction and, for AdaIAD, whose teacher term")
    alpha: float = Field(1.0, ge=0, le=1, description="weight of the adversarial term")
    reduction: Reduction | None = Field(None, description="left out: emean up to 10 classes, bmean above; AdaIAD: bmean")
    clean_bn_pass: bool = Field(
        True, description="run the clean pass also at alpha 1: it has no weight but moves running statistics"
    )
    introspection: bool = Field(False, description="AdaIAD: the student's clean prediction where the teacher errs at x'")
    tau: float = Field(30.0, gt=0, description="AdaIAD: temperature of the teacher term, which is multiplied by tau^2")
    gate_epoch: int = Field(60, ge=0, description="AdaIAD: first epoch, 0-based, of the introspective term")
    beta: float = Field(0.1, ge=0, description="AdaIAD: exponent of the trust w = pT(y | x')^beta")
    weight_teacher_term: bool | None = Field(
        None, description="AdaIAD: multiply the teacher term by w too; left out: as in `variant`"
    )

    @field_validator("introspection")
    @classmethod
    def _one_teacher_term(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("alpha", 1) != 1:
            raise ValueError("there is no clean teacher term then: leave alpha at 1")
        return value

    @field_validator("tau", "gate_epoch", "beta", "weight_teacher_term")
    @classmethod
    def _of_adaiad(cls, value: Any, info: ValidationInfo) -> Any:
        # a resolved recipe writes every knob out, so the default passes
        if info.data.get("introspection") is False and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("a knob of AdaIAD, add introspection: true")
        return value


class Adaad(Method[AdaadConfig, None]):
    """Adaptive adversarial distillation."""

    summary = "match the robust teacher where student and teacher disagree most"
    paper = "Huang et al., CVPR 2023"
    equation = (
        "inner: max KL(T(x') || S(x'))    outer: a KL(T(x') || S(x')) + (1 - a) KL(T(x) || S(x)), a = 1; "
        "introspection: tau^2 KL_tau(T(x') || S(x')) + mean (1 - pT(y|x')^0.1) KL(S(x) || S(x'))"
    )
    departures = "none; the code's reductions, which differ by data set (variant: paper has one)"
    roles = ("robust",)
    labels = False
    through_teacher = True
    Config = AdaadConfig

    @classmethod
    def labels_for(cls, config: MethodConfig) -> bool:
        """AdaIAD reads the teacher's trust in the label."""
        return isinstance(config, AdaadConfig) and config.introspection

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(T(x') || S(x')); both sides move with x'."""
        return lambda x_adv: kl(nets.robust(x_adv), nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """Alpha KL at x' + (1 - alpha) KL at x, or AdaIAD's; passes: clean, then adversarial."""
        if self.config.introspection:
            return self._introspective(nets, batch, gated=clock.epoch < self.config.gate_epoch)
        alpha = self.config.alpha
        clean = batch.x.new_zeros(())
        if alpha < 1 or self.config.clean_bn_pass:
            clean = self._mean(kl(fixed(nets.robust, batch.x), nets.student(batch.x)))
        adversarial = self._mean(batch.weighted(kl(fixed(nets.robust, batch.x_adv), nets.student(batch.x_adv))))
        loss = alpha * adversarial + (1 - alpha) * clean if alpha < 1 else adversarial
        return loss, terms(kl_adv=adversarial, kl_clean=clean)

    def _introspective(self, nets: Nets, batch: Batch, *, gated: bool) -> tuple[Tensor, Terms]:
        """AdaIAD; S(x) is live, so the introspective term sends gradient through both passes."""
        config = self.config
        own = nets.student(batch.x) if config.clean_bn_pass or not gated else None
        teacher, student = fixed(nets.robust, batch.x_adv), nets.student(batch.x_adv)
        per_image = config.tau**2 * kl(teacher, student, tau=config.tau)
        log_trust = -config.beta * cross_entropy(teacher, batch.y)  # of pT(y | x')^beta
        trust = log_trust.exp()
        weigh = config.variant == "paper" if config.weight_teacher_term is None else config.weight_teacher_term
        if weigh and not gated:
            per_image = trust * per_image
        adversarial = self._mean(batch.weighted(per_image))
        if gated or own is None:
            return adversarial, terms(kl_adv=adversarial, trust=trust.mean())
        # 1 - w of a teacher that is almost certain would keep few digits
        self_term = self._mean(-torch.expm1(log_trust) * kl(own, student))
        return adversarial + self_term, terms(kl_adv=adversarial, kl_own=self_term, trust=trust.mean())

    def _mean(self, per_image: Tensor) -> Tensor:
        config = self.config
        by_data_set = config.variant == "code" and not config.introspection and self.classes <= 10
        return reduce(per_image, config.reduction or ("emean" if by_data_set else "bmean"), classes=self.classes)


ENTRY = Adaad
