"""DGAD: rows the teacher gets wrong teach clean accuracy, rows it gets right teach robustness.

Park & Min, "Dynamic Guidance Adversarial Distillation with Enhanced Teacher Knowledge", ECCV 2024 (methods.md, 4.6).
MAP divides the batch by the teacher's clean decision, ELS repairs wrong rows by exchanging two class scores, PCR ties
the student's clean and adversarial predictions together.

Departures: each row has weight 1/B (the released code weighs by the nominal batch size and over-weighs the last,
shorter batch); all rows wrong gives no adversarial term instead of a division by zero; MobileNetV2's misplaced
parenthesis is read as `kl_scale` 0.5, which recipes for that student set. All rows are attacked, as in the code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import full, kl, margin
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class DgadConfig(MethodConfig, frozen=True):
    """Knobs of DGAD; each part of the paper's ablation can be switched off."""

    name: Literal["dgad"] = "dgad"
    beta: float = Field(5.0, ge=0, description="weight of PCR: 5 for ResNet-18, 10 for MobileNetV2, 15 on Tiny-ImageNet")
    kl_scale: float = Field(1.0, gt=0, description="weight of both KL terms; 0.5 for MobileNetV2")
    partition: bool = Field(True, description="MAP: send rows the teacher gets wrong to the clean term")
    swap_clean: bool = Field(True, description="ELS on clean images: exchange label and top logit of wrong rows")
    swap_adversarial: bool = Field(True, description="ELS on adversarial images")


class Dgad(Method[DgadConfig, None]):
    """Dynamic guidance adversarial distillation."""

    summary = "AdaAD's attack; wrong teacher rows are repaired and sent to the clean term"
    paper = "Park & Min, ECCV 2024"
    equation = (
        "inner: max KL(T(x') || S(x'))    "
        "outer: 1/B [ sum_wrong KL(T~(x) || S(x)) + sum_right KL(T~(x') || S(x')) ] + beta mean (pS(x') - pS(x))^2"
    )
    departures = "real batch size in every weight; no division by zero; MobileNetV2's parenthesis read as kl_scale 0.5"
    roles = ("robust",)
    through_teacher = True
    Config = DgadConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(T(x') || S(x')) with the original teacher; both sides move with x'."""
        return lambda x_adv: kl(nets.robust(x_adv), nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """The equation above; passes: clean, then adversarial, two separate batch-norm batches."""
        config, y = self.config, batch.y
        clean_teacher, adv_teacher = fixed(nets.robust, batch.x), fixed(nets.robust, batch.x_adv)
        clean, adversarial = nets.student(batch.x), nets.student(batch.x_adv)
        wrong = clean_teacher.argmax(1) != y if config.partition else y < 0
        if config.swap_clean:
            clean_teacher = exchange(clean_teacher, y, wrong)
        if config.swap_adversarial:
            adv_teacher = exchange(adv_teacher, y, margin(adv_teacher, y) < 0)
        # where() rather than a product with the mask: an infinite KL of an unused row must not become NaN
        rows = len(y)
        st = kl(clean_teacher, clean).where(wrong, 0.0).sum() / rows
        at = batch.weighted(kl(adv_teacher, adversarial).where(~wrong, 0.0)).sum() / rows
        pcr = (full(adversarial).softmax(1) - full(clean).softmax(1)).square().mean()
        loss = config.kl_scale * (st + at) + config.beta * pcr
        return loss, terms(kl_clean=st, kl_adv=at, pcr=pcr, teacher_wrong=wrong.float().mean())


def exchange(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """ELS: in the given rows exchange the label's logit with the largest one; other rows stay bit-identical.

    Args:
        logits: (N, C).
        y: labels (N,).
        rows: (N,) bool.
    """
    top = logits.argmax(1, keepdim=True)
    label = y[:, None]
    swapped = logits.scatter(1, label, logits.gather(1, top)).scatter(1, top, logits.gather(1, label))
    return swapped.where(rows[:, None], logits)


ENTRY = Dgad
