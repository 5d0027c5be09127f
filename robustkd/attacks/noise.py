"""Random noise: the worst of several draws. A baseline; no attack may be weaker.

Half of the draws are uniform in the ball, half lie on its surface (a random sign per pixel, or a random
direction for l2).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.losses import margin
from robustkd.threat import ThreatModel


class Noise(Attack, frozen=True):
    """Random draws from the ball."""

    summary: ClassVar[str] = "random draws from the ball; a baseline that every attack must beat"
    needs: ClassVar[Literal["gradient", "logits"]] = "logits"
    name: Literal["noise"] = "noise"
    draws: int = Field(10, ge=0)

    @torch.no_grad()
    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        rng = Generator(device=x.device).manual_seed(seed)
        worst, lowest = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
        for draw in range(self.draws):
            z = threat.project(_draw(x, threat, rng, surface=bool(draw % 2)), x)
            found = margin(model(z), y)
            better = found < lowest
            worst[better], lowest[better] = z[better], found[better]
        return worst


def _draw(x: Tensor, threat: ThreatModel, rng: Generator, *, surface: bool) -> Tensor:
    if not surface:
        return threat.start(x, "uniform", rng)
    return x + threat.eps * threat.step(torch.empty_like(x).normal_(generator=rng))


ENTRY = Noise
