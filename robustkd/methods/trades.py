"""TRADES: label loss on clean images plus a penalty on how far the prediction can be moved inside the ball.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019 (methods.md, 3.2).

Departures: none. Three training passes, as in the released code: clean (CE), adversarial, clean again (KL target).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy, kl
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, fixed, terms


class TradesConfig(MethodConfig, frozen=True):
    """Knobs of TRADES."""

    name: Literal["trades"] = "trades"
    beta: float = Field(6.0, ge=0, description="weight of the KL term")


class Trades(Method[TradesConfig, None]):
    """Trade-off between natural error and boundary error."""

    summary = "clean label loss plus KL between clean and adversarial predictions, no teacher"
    paper = "Zhang et al., ICML 2019"
    equation = "inner: max KL(S(x) || S(x'))    outer: mean CE(S(x), y) + beta * bmean KL(S(x) || S(x'))"
    Config = TradesConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """KL(S(x) || S(x')); the target is fixed while x' moves."""
        target = fixed(nets.student, x)
        return lambda x_adv: kl(target, nets.student(x_adv))

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """Mean CE + beta * bmean KL. The target S(x) is not detached: gradient flows through both sides."""
        ce = cross_entropy(nets.student(batch.x), batch.y).mean()
        adversarial = nets.student(batch.x_adv)
        gap = kl(nets.student(batch.x), adversarial).mean()
        return ce + self.config.beta * gap, terms(ce=ce, kl=gap)


ENTRY = Trades
