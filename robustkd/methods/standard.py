"""Standard training on clean images: no adversary, no teacher. The undefended yardstick."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, terms


class StandardConfig(MethodConfig, frozen=True):
    """Standard training has no knobs."""

    name: Literal["standard"] = "standard"


class Standard(Method[StandardConfig, None]):
    """Cross-entropy on clean images."""

    summary = "cross-entropy on clean images; the undefended yardstick"
    paper = "none"
    equation = "outer: mean CE(S(x), y)"
    adversarial = False
    Config = StandardConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y); used for evaluation only, never in training."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """(1/B) sum CE(S(x), y)."""
        ce = cross_entropy(nets.student(batch.x), batch.y).mean()
        return ce, terms(ce=ce)


ENTRY = Standard
