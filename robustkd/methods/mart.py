"""MART: images the network gets wrong when clean count more for robustness.

Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020 (methods.md,
3.3). The label loss at x' is boosted by the strongest wrong class, and the consistency term is weighted by the clean
error. Neither the reference S(x) nor the weight 1 - p_y is detached.

Departures: none. `beta` is the 5 of the released ResNet-18 script; the function's own default, and the value for
WRN-34-10, is 6. The constants 1.0001, 1.0000001 and 1e-12 are the released code's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy, full
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms, terms

TINY = 1e-12  # inside both logarithms


class MartConfig(MethodConfig, frozen=True):
    """Knobs of MART."""

    name: Literal["mart"] = "mart"
    beta: float = Field(5.0, ge=0, description="weight of the KL term: 5 for ResNet-18, 6 for WRN-34-10")


class Mart(Method[MartConfig, None]):
    """Misclassification-aware adversarial training."""

    summary = "boosted label loss; images wrong when clean weigh more, no teacher"
    paper = "Wang et al., ICLR 2020"
    equation = (
        "p = softmax S(x), q = softmax S(x'), k = strongest class but y    inner: max CE(S(x'), y)    "
        "outer: mean [ CE(S(x'), y) - log(1.0001 - q_k) ] + beta * mean KL(p || q) (1.0000001 - p_y)"
    )
    Config = MartConfig

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y)."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """Boosted CE + beta * weighted KL, gradient through every part; passes: clean, then adversarial."""
        y = batch.y
        clean, adversarial = nets.student(batch.x), nets.student(batch.x_adv)
        log_p, log_q = full(clean).log_softmax(1), full(adversarial).log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        boost = -(1.0001 - _pick(q, rival(adversarial, y)) + TINY).log()
        bce = (cross_entropy(adversarial, y) + boost).mean()
        gap = (p * (log_p - (q + TINY).log())).sum(1)
        weighted = (gap * (1.0000001 - _pick(p, y))).mean()
        return bce + self.config.beta * weighted, terms(bce=bce, kl=weighted)


def rival(logits: Tensor, y: Tensor) -> Tensor:
    """The class with the largest logit among all but the label, (N,).

    Args:
        logits: (N, C), C at least 2. Logits and not probabilities, which tie at 0 in a certain network.
        y: labels (N,).
    """
    return full(logits).scatter(1, y[:, None], float("-inf")).argmax(1)


def _pick(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(1, columns[:, None]).squeeze(1)


ENTRY = Mart
