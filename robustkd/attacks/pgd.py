"""PGD on the cross entropy: x <- project(x + step_size * steepest step), uniform start in the ball.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. A sanity line, not a
verdict: with a fixed step it stays several points behind APGD.

Departures: the first iterate that fools the model is returned, not the last one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from robustkd.ascent import ascend
from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.losses import cross_entropy, margin
from robustkd.threat import ThreatModel


class PGD(Attack, frozen=True):
    """Projected gradient ascent on the cross entropy."""

    summary: ClassVar[str] = "projected gradient ascent on the cross entropy, fixed step eps/4; a sanity line"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    name: Literal["pgd"] = "pgd"
    steps: int = Field(10, ge=0)
    step: float = Field(0.25, gt=0, description="length of one step as a part of eps")

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        if not self.steps:
            return x.clone()
        fooling, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def objective(z: Tensor) -> Tensor:
            logits = model(z)
            inside = threat.project(z.detach(), x)  # the start itself is not yet cut to [0, 1]
            new = (margin(logits.detach(), y) <= 0) & ~fooled & (inside == z.detach()).flatten(1).all(1)
            fooling[new] = z.detach()[new]
            fooled.logical_or_(new)
            return cross_entropy(logits, y)

        last = ascend(
            objective,
            x,
            threat=threat,
            steps=self.steps,
            step_size=threat.eps * self.step,
            start="uniform",
            rng=Generator(device=x.device).manual_seed(seed),
        )
        return torch.where(fooled.view(-1, *[1] * (x.dim() - 1)), fooling, last)


ENTRY = PGD
