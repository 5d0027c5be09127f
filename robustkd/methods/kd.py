"""KD: plain knowledge distillation on clean images, with no adversary: the yardstick for what distillation alone gives.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (NIPS 2014 deep learning workshop).

Departures: none. The paper fixes neither knob: it finds temperatures from 2.5 to 4 best for a small net, so `tau` is 4,
and asks for a considerably lower weight on the labels, so `alpha` is 0.9.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy, kl
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class KdConfig(MethodConfig, frozen=True):
    """Knobs of plain distillation."""

    name: Literal["kd"] = "kd"
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher's term; the rest is the label loss")
    tau: float = Field(4.0, gt=0, description="temperature of both sides")


class Kd(Method[KdConfig, None]):
    """Knowledge distillation on clean images."""

    summary = "match a clean teacher's softened prediction on clean images; no adversary"
    paper = "Hinton et al., 2015"
    equation = "outer: a tau^2 bmean KL(T(x)/tau || S(x)/tau) + (1 - a) mean CE(S(x), y), a = 0.9, tau = 4"
    roles = ("clean",)
    adversarial = False
    Config = KdConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y); used for evaluation only, never in training."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """The equation above; one clean pass."""
        config = self.config
        student = nets.student(batch.x)
        taught = config.tau**2 * kl(fixed(nets.teachers["clean"], batch.x), student, tau=config.tau).mean()
        ce = cross_entropy(student, batch.y).mean()
        return config.alpha * taught + (1 - config.alpha) * ce, terms(kl=taught, ce=ce)


ENTRY = Kd
