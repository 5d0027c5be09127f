"""SAAD: images count by how unsure the robust teacher is of them under attack; the attack has a cheap live teacher.

Lee & Chung, "Sample-wise Adaptive Weighting for Transfer Consistency in Adversarial Distillation", TMLR 2026 (methods.md,
6.2), for teachers so strong that the student's adversarial images do not move them.
The attack's target is the clean prediction with a first-order correction, from one backward pass of the teacher:

    g_i = grad_x T(x)_y;   z_i(x') = T(x) with lambda <g_i, x' - x> added to entry y
    H_i = entropy of pT(x'_i);   w_i = 5 (H_i - min H);   wn_i = (w_i - min w) / (max w - min w + 1e-8)

Departures: the default `alpha` is IGDM's for CIFAR-10, assumed here. With several processes, the smallest entropy and the
largest weight are those of a process's own images (the add-on `entropy_weights` takes them over all). No licence comes
with the code, so this is written from the equations. The student's weights are averaged by the recipe
(`addons.average: {name: swa, start_epoch: 95}`), not by the method.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import full, kl
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms
from robustkd.methods._guidance import difference_gap, excess_entropy, mirrored, ramp


class SaadConfig(MethodConfig, frozen=True):
    """Knobs of SAAD."""

    name: Literal["saad"] = "saad"
    alpha: float = Field(1.0, ge=0, description="weight of IGDM in the last epoch; 10 on CIFAR-100; at 0 its pass is left out")
    beta: float = Field(0.0, ge=0, description="weight of the clean term")
    correction: float = Field(1.0, ge=0, description="lambda of the attack's target; 0 is RSLAD's attack")
    scale: float = Field(5.0, gt=0, description="w_i = scale (H_i - min H)")
    clean_bn_pass: bool = Field(
        True, description="run the clean pass also at beta 0: it has no weight but moves running statistics"
    )


class Saad(Method[SaadConfig, None]):
    """Sample-wise adaptive adversarial distillation."""

    summary = "weigh each image by the robust teacher's entropy under attack; a first-order live teacher in the attack"
    paper = "Lee & Chung, TMLR 2026"
    equation = (
        "z(x') = T(x) + lambda <grad T(x)_y, x' - x> onehot(y)    inner: max KL(z(x') || S(x'))    "
        "outer: 1/B sum w_i [ KL(T(x') || S(x'))_i + alpha (epoch/E) IGDM_i ] + beta (1 - wn_i) KL(T(x) || S(x))_i, "
        "w_i = 5 (H(T(x'_i)) - min H)"
    )
    departures = "default alpha assumed from IGDM; several processes take the smallest entropy each over its own images"
    roles = ("robust",)
    through_teacher = True
    includes = ("igdm", "entropy_weights")
    Config = SaadConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(softmax z(x') || S(x')), with gradient also through z; the teacher runs once, forward and back."""
        target = self.target(nets, x, y)
        return lambda x_adv: kl(target(x_adv), nets.student(x_adv))

    def target(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """The corrected teacher z: x' -> logits (N, C); at x it is the teacher's, and elsewhere differs in entry y only."""
        logits, slope = _tangent(nets, x, y)
        label = torch.nn.functional.one_hot(y, logits.shape[1])

        def corrected(x_adv: Tensor) -> Tensor:
            rise = (slope * (full(x_adv) - full(x))).flatten(1).sum(1)
            return logits + self.config.correction * rise[:, None] * label

        return corrected

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """The equation above; passes: adversarial, mirrored, clean."""
        config, zero = self.config, batch.x.new_zeros((), dtype=torch.float32)
        teacher, student = fixed(nets.robust, batch.x_adv), nets.student(batch.x_adv)
        weights = excess_entropy(teacher, scale=config.scale)
        adversarial = (weights * kl(teacher, student)).mean()
        igdm = clean = zero
        if config.alpha > 0:
            away = mirrored(batch)
            teacher_away = fixed(nets.robust, away)
            igdm = (weights * difference_gap((teacher, teacher_away), (student, nets.student(away)))).mean()
        if config.beta > 0 or config.clean_bn_pass:
            spread = (weights - weights.min()) / (weights.max() - weights.min() + 1e-8)
            clean = ((1 - spread) * kl(fixed(nets.robust, batch.x), nets.student(batch.x))).mean()
        loss = adversarial + ramp(config.alpha, clock) * igdm
        loss = loss + config.beta * clean if config.beta > 0 else loss
        return loss, terms(kl_adv=adversarial, igdm=igdm, kl_clean=clean, weight_mean=weights.mean())


def _tangent(nets: Nets, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's logits (N, C) on x, and the gradient (N, ...) in x of each label's logit."""
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        logits = full(nets.robust(at))
        (slope,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), at)
    return logits.detach(), slope


ENTRY = Saad
