"""Random noise: the worst of several draws. A baseline; no attack may be weaker.

Half of the draws are uniform in the ball, half lie on its surface (a random sign per pixel, or a random
direction for l2).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.attacks._starts import Starts
from robustkd.losses import margin
from robustkd.threat import ThreatModel


class Noise(Attack, frozen=True):
    """Random draws from the ball."""

    summary: ClassVar[str] = "random draws from the ball; a baseline that every attack must beat"
    needs: ClassVar[Literal["gradient", "logits"]] = "logits"
    per_image: ClassVar[bool] = True
    name: Literal["noise"] = "noise"
    draws: int = Field(10, ge=0)

    @torch.no_grad()
    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        starts = Starts(x, seed)
        worst, lowest = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
        for draw in range(self.draws):
            z = threat.project(_draw(x, threat, starts, draw), x)
            found = margin(model(z), y)
            better = found < lowest
            worst[better], lowest[better] = z[better], found[better]
        return worst


def _draw(x: Tensor, threat: ThreatModel, starts: Starts, draw: int) -> Tensor:
    return x + threat.eps * threat.step(starts.normal(draw)) if draw % 2 else starts.inside(draw, threat)


ENTRY = Noise
