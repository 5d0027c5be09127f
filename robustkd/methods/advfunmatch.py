"""AdvFunMatch: the student matches the robust teacher's function over the whole ball, on strongly augmented images.

"AdvFunMatch", arXiv 2305.14700 (methods.md, 4.8). Student and teacher always look at the same tensor: the augmented
image, and the point of its ball where they differ most. No label takes part. Strong augmentation is what sets it apart
from AdaAD; it is the recipe's, drawn before the attack: see `train.augment`.

Departures: only the abstract could be read. Not verified, and taken from AdaAD: the KL's direction (forward), start, step
size and number of steps, temperature 1, the clean pass that moves running statistics (which makes it AdaAD with alpha 1
and bmean where nothing is augmented). Epochs, teachers and every published number are not verified either.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import Reduction, kl, reduce
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class AdvfunmatchConfig(MethodConfig, frozen=True):
    """Knobs of AdvFunMatch."""

    name: Literal["advfunmatch"] = "advfunmatch"
    reduction: Reduction = Field("bmean", description="not verified; bmean on every data set")
    clean_bn_pass: bool = Field(True, description="run AdaAD's clean pass, which has no weight but moves running statistics")


class Advfunmatch(Method[AdvfunmatchConfig, None]):
    """Adversarial function matching."""

    summary = "match the robust teacher over the whole ball on strongly augmented images, no labels"
    paper = "AdvFunMatch, arXiv 2305.14700 (abstract only)"
    equation = "x~ = Aug(x)    inner: max KL(T(x~ + d) || S(x~ + d))    outer: the same KL at the point found"
    departures = "only the abstract could be read: KL direction, attack, temperature and batch-norm passes are AdaAD's"
    roles = ("robust",)
    labels = False
    through_teacher = True
    Config = AdvfunmatchConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(T(x') || S(x')); both sides move with x'."""
        return lambda x_adv: kl(nets.robust(x_adv), nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """KL(T(x') || S(x')); passes: clean (without weight), then adversarial."""
        clean = batch.x.new_zeros(())
        if self.config.clean_bn_pass:
            clean = self._mean(kl(fixed(nets.robust, batch.x), nets.student(batch.x)))
        adversarial = self._mean(batch.weighted(kl(fixed(nets.robust, batch.x_adv), nets.student(batch.x_adv))))
        return adversarial, terms(kl_adv=adversarial, kl_clean=clean)

    def _mean(self, per_image: Tensor) -> Tensor:
        return reduce(per_image, self.config.reduction, classes=self.classes)


ENTRY = Advfunmatch
