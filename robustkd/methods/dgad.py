"""DGAD: rows the teacher gets wrong teach clean accuracy, rows it gets right teach robustness.

Park & Min, "Dynamic Guidance Adversarial Distillation with Enhanced Teacher Knowledge", ECCV 2024 (methods.md, 4.6).
MAP divides the batch by the teacher's clean decision, ELS repairs wrong rows by exchanging two class scores, PCR ties
the student's clean and adversarial predictions together. Each part can be switched off. The paper's ablation, each word
after a `--set` of its own (which images its ELS rows are for is inferred):

    base             method.partition=false method.swap_clean=false method.swap_adversarial=false method.pcr=false
    MAP              method.swap_clean=false method.swap_adversarial=false method.pcr=false
    MAP PCR          method.swap_clean=false method.swap_adversarial=false
    ELS(x')          method.partition=false method.swap_clean=false method.pcr=false
    MAP ELS(x')      method.swap_clean=false method.pcr=false
    MAP ELS(x)       method.swap_adversarial=false method.pcr=false
    MAP ELS(x, x')   method.pcr=false
    all              (none: the defaults)

The paper's base is AdaAD with its emean on CIFAR-10, this one has bmean. Alternatives to the exchange: `repair: smooth`
puts (1 - share) onehot(y) + share / C in place of a wrong row, `repair: mix` (1 - share) onehot(y) + share pT. The paper's
formulas are lost: both, and their shares, are our reading.

Departures (`variant: fixed`): each row has weight 1/B; all rows wrong gives no adversarial term instead of a division by
zero; MobileNetV2's misplaced parenthesis is read as `kl_scale` 0.5, which recipes for that student set; PCR covers all
rows, as in the code. `variant: code` is the released formula: weights n1/bs and (bs - n1)/bs with the nominal batch size
bs = `batch_size`, which over-weigh the last, shorter batch; with another `kl_scale` than 1 its misplaced parenthesis,
kl_scale (n1/bs L_ST + (bs - n1)/bs) L_AT; where it would divide by zero there is no adversarial term. `variant: paper`
has adversarial images of the right rows only, our reading: wrong rows stay clean in the adversarial pass, without PCR.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import full, kl, margin
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms
from robustkd.methods._repair import Repair, repaired


class DgadConfig(MethodConfig, frozen=True):
    """Knobs of DGAD; each part of the paper's ablation can be switched off."""

    name: Literal["dgad"] = "dgad"
    variant: Literal["fixed", "code", "paper"] = Field("fixed", description="code: released weights; paper: attack right rows")
    beta: float = Field(5.0, ge=0, description="weight of PCR: 5 for ResNet-18, 10 for MobileNetV2, 15 on Tiny-ImageNet")
    kl_scale: float = Field(1.0, gt=0, description="weight of both KL terms; 0.5 for MobileNetV2")
    partition: bool = Field(True, description="MAP: send rows the teacher gets wrong to the clean term")
    swap_clean: bool = Field(True, description="ELS on clean images: repair wrong rows by exchanging label and top logit")
    swap_adversarial: bool = Field(True, description="ELS on adversarial images")
    pcr: bool = Field(True, description="PCR: tie the student's clean and adversarial predictions")
    repair: Repair = Field("swap", description="what ELS does: swap; smooth or mix in its place (our reading)")
    repair_share: float = Field(0.1, gt=0, lt=1, description="smooth, mix: share of the uniform or the teacher's distribution")
    batch_size: int = Field(128, ge=1, description="variant code: nominal batch size of one process")

    @field_validator("repair_share", "batch_size")
    @classmethod
    def _has_a_use(cls, value: float, info: ValidationInfo) -> float:
        # a resolved recipe writes every knob out, so the default passes
        used = info.data.get("repair") != "swap" if info.field_name == "repair_share" else info.data.get("variant") == "code"
        if not used and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(
                "this is of repair smooth and mix" if info.field_name == "repair_share" else "this is of variant code"
            )
        return value


class Dgad(Method[DgadConfig, None]):
    """Dynamic guidance adversarial distillation."""

    summary = "AdaAD's attack; wrong teacher rows are repaired and sent to the clean term"
    paper = "Park & Min, ECCV 2024"
    equation = (
        "inner: max KL(T(x') || S(x'))    "
        "outer: 1/B [ sum_wrong KL(T~(x) || S(x)) + sum_right KL(T~(x') || S(x')) ] + beta mean (pS(x') - pS(x))^2"
    )
    departures = (
        "real batch size in every weight; no division by zero; MobileNetV2's parenthesis read as kl_scale 0.5 "
        "(variant: code has the released formula)"
    )
    roles = ("robust",)
    through_teacher = True
    Config = DgadConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(T(x') || S(x')) with the original teacher; both sides move with x'."""
        return lambda x_adv: kl(nets.robust(x_adv), nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """The equation above; passes: clean, then adversarial, two separate batch-norm batches."""
        config, y, x_adv = self.config, batch.y, batch.x_adv
        clean_teacher = fixed(nets.robust, batch.x)
        wrong = clean_teacher.argmax(1) != y if config.partition else y < 0
        if config.variant == "paper":
            x_adv = batch.x.where(wrong[:, None, None, None], x_adv)
        adv_teacher = fixed(nets.robust, x_adv)
        clean, adversarial = nets.student(batch.x), nets.student(x_adv)
        if config.swap_clean:
            clean_teacher = self._repaired(clean_teacher, y, wrong)
        if config.swap_adversarial:
            adv_teacher = self._repaired(adv_teacher, y, margin(adv_teacher, y) < 0)
        # where() rather than a product with the mask: an infinite KL of an unused row must not become NaN
        st = kl(clean_teacher, clean).where(wrong, 0.0).sum()
        at = batch.weighted(kl(adv_teacher, adversarial).where(~wrong, 0.0)).sum()
        pcr = self._pcr(clean, adversarial, wrong)
        distil = self._as_coded(st, at, wrong) if config.variant == "code" else config.kl_scale * (st + at) / len(y)
        loss = distil + config.beta * pcr if config.pcr else distil
        return loss, terms(kl_clean=st / len(y), kl_adv=at / len(y), pcr=pcr, teacher_wrong=wrong.float().mean())

    def _repaired(self, teacher: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return repaired(teacher, y, rows, how=self.config.repair, share=self.config.repair_share)

    def _pcr(self, clean: Tensor, adversarial: Tensor, wrong: Tensor) -> Tensor:
        gap = (full(adversarial).softmax(1) - full(clean).softmax(1)).square()
        if self.config.variant == "paper":
            gap = gap.where(~wrong[:, None], 0.0)
        return gap.mean()

    def _as_coded(self, st: Tensor, at: Tensor, wrong: Tensor) -> Tensor:
        """The released distillation terms from sums over wrong and right rows."""
        scale, nominal = self.config.kl_scale, self.config.batch_size
        n1 = wrong.sum()
        mean_st, mean_at = st / (n1 + 1e-10), at / (len(wrong) - n1).clamp(min=1)
        share_st, share_at = n1 / nominal, (nominal - n1) / nominal
        if scale == 1:
            return share_st * mean_st + share_at * mean_at
        return scale * (share_st * mean_st + share_at) * mean_at


ENTRY = Dgad
