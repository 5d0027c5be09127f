"""PGD-AT: train on worst-case images of the current network with the plain label loss.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018; here in the form of the
row "PGD-AT" of the distillation tables (methods.md, section 3.1).

Departures: the start's noise is clamped to [0, 1] by the first projection rather than before the first gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, terms


class PgdAtConfig(MethodConfig, frozen=True):
    """Knobs of PGD-AT."""

    name: Literal["pgd-at"] = "pgd-at"
    clean_bn_pass: bool = Field(
        True,
        description="run the unused clean pass in train mode: it has no gradient but moves running statistics",
    )


class PgdAt(Method[PgdAtConfig, None]):
    """Adversarial training without a teacher."""

    summary = "adversarial training on labels, no teacher"
    paper = "Madry et al., ICLR 2018"
    equation = "inner: max CE(S(x'), y)    outer: mean CE(S(x'), y)"
    departures = "the start's noise is clamped by the first projection, not before the first gradient"
    Config = PgdAtConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y)."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """(1/B) sum CE(S(x'), y); passes: adversarial, then the unused clean one."""
        ce = cross_entropy(nets.student(batch.x_adv), batch.y).mean()
        if self.config.clean_bn_pass:
            with torch.no_grad():
                nets.student(batch.x)
        return ce, terms(ce_adv=ce)


ENTRY = PgdAt
