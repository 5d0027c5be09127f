"""ARD: under a label attack the student reproduces what the robust teacher says of the clean image.

Goldblum et al., "Adversarially Robust Distillation", AAAI 2020 (methods.md, 4.1). The student attacks itself in train
mode, from a uniform start; the teacher looks at x, never at x'.

Departures: none by default. "ARD" in a table is not one thing: ports use tau 1 and bmean (`tau`, `reduction`), an attack
in eval mode (`inner.batch_norm`) or a teacher at x' (`teacher_input`). The released schedule sets lr 0.01 at epoch 100
and, by mistake, again at 150; the step schedule drops twice, and `train.schedule.milestones: [100]` is the released one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, cross_entropy, kl, reduce
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class ArdConfig(MethodConfig, frozen=True):
    """Knobs of ARD."""

    name: Literal["ard"] = "ard"
    alpha: float = Field(1.0, ge=0, le=1, description="weight of the teacher's term; the rest is the clean label loss")
    tau: float = Field(30.0, gt=0, description="temperature of both sides; ports of ARD use 1")
    reduction: Reduction = Field("emean", description="emean as released; ports of ARD use bmean")
    teacher_input: Literal["clean", "adversarial"] = Field("clean", description="what the teacher looks at")
    clean_bn_pass: bool = Field(
        True, description="run the clean pass also at alpha 1: it has no weight but moves running statistics"
    )


class Ard(Method[ArdConfig, None]):
    """Adversarially robust distillation."""

    summary = "label attack; match the robust teacher's softened clean prediction"
    paper = "Goldblum et al., AAAI 2020"
    equation = "inner: max CE(S(x'), y)    outer: a tau^2 KL(T(x)/tau || S(x')/tau) + (1 - a) mean CE(S(x), y), a = 1, tau = 30"
    departures = "none by default; the released schedule's repeated lr at epoch 150 is milestones: [100]"
    roles = ("robust",)
    start = "uniform"
    attack_mode = "train"
    Config = ArdConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y)."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """The equation above; passes: adversarial, then clean."""
        config = self.config
        target = fixed(nets.robust, batch.x if config.teacher_input == "clean" else batch.x_adv)
        gap = batch.weighted(kl(target, nets.student(batch.x_adv), tau=config.tau))
        taught = config.tau**2 * reduce(gap, config.reduction, classes=self.classes)
        if config.alpha == 1 and not config.clean_bn_pass:
            return taught, terms(kl_adv=taught)
        ce = cross_entropy(nets.student(batch.x), batch.y).mean()
        loss = config.alpha * taught + (1 - config.alpha) * ce if config.alpha < 1 else taught
        return loss, terms(kl_adv=taught, ce_clean=ce)


ENTRY = Ard
