"""AKD: adversarial training whose targets mix the label with the teacher's opinion of the adversarial image.

Maroto et al., "On the Benefits of Knowledge Distillation for Adversarial Robustness", 2022 (methods.md, 4.7). Not the
AKD2 of IAD, which is `iad` with `form: akd2`.

Departures: unknown, for neither code nor settings could be had; this is written from the abstract. Assumed are the
attack (PGD-AT's), the teacher's input x' (`teacher_input`), temperature 1, `alpha` 0.5, and PGD-AT's unused clean pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy, full
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class AkdConfig(MethodConfig, frozen=True):
    """Knobs of AKD; none of the defaults is published."""

    name: Literal["akd"] = "akd"
    alpha: float = Field(0.5, ge=0, le=1, description="the teacher's share in the target; assumed, not published")
    teacher_input: Literal["clean", "adversarial"] = Field(
        "adversarial", description="what the teacher looks at; assumed, not published"
    )
    clean_bn_pass: bool = Field(
        True, description="run PGD-AT's unused clean pass in train mode: it moves running statistics; assumed"
    )


class Akd(Method[AkdConfig, None]):
    """Adversarial training on a mixture of label and teacher."""

    summary = "adversarial training towards a mixture of label and robust teacher"
    paper = "Maroto et al., 2022"
    equation = "inner: max CE(S(x'), y)    outer: mean CE(S(x'), q), q = a softmax T(x') + (1 - a) onehot(y), a = 0.5"
    departures = "written from the abstract; attack, teacher's input, temperature 1, a = 0.5, clean pass are assumed"
    roles = ("robust",)
    Config = AkdConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y)."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """Cross entropy to the mixture, as the mixture of two; passes: adversarial, then the unused clean one."""
        config = self.config
        opinion = full(fixed(nets.robust, batch.x_adv if config.teacher_input == "adversarial" else batch.x))
        adversarial = nets.student(batch.x_adv)
        soft = batch.weighted(-(opinion.softmax(1) * full(adversarial).log_softmax(1)).sum(1)).mean()
        hard = cross_entropy(adversarial, batch.y).mean()
        if config.clean_bn_pass:
            with torch.no_grad():
                nets.student(batch.x)
        return config.alpha * soft + (1 - config.alpha) * hard, terms(ce_teacher=soft, ce_label=hard)


ENTRY = Akd
