"""PGD on the cross entropy: x <- project(x + step_size * steepest step), uniform start in the ball.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. A sanity line, not a
verdict: with a fixed step it stays several points behind APGD.

Departures: the start of an image comes from a stream of its own; the first iterate that fools the model is returned, not
the last one, and its image then leaves the batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.ascent import ascend
from robustkd.attacks._base import Attack, Found, Model, isolated, prepared
from robustkd.attacks._guard import Guard
from robustkd.attacks._starts import Starts
from robustkd.losses import cross_entropy, margin
from robustkd.threat import ThreatModel, per_image


class PGD(Attack, frozen=True):
    """Projected gradient ascent on the cross entropy."""

    summary: ClassVar[str] = "projected gradient ascent on the cross entropy, fixed step eps/4; a sanity line"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    per_image: ClassVar[bool] = True
    name: Literal["pgd"] = "pgd"
    steps: int = Field(10, ge=0)
    step: float = Field(0.25, gt=0, description="length of one step as a part of eps")

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        return self._climb(model, x, y, threat, Starts(x, seed).inside(0, threat)) if self.steps else x.clone()

    def onward(self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, start: Tensor) -> Found:
        """As `perturb`, but from the projection of given images instead of a random point."""
        with prepared(model), isolated(0):
            guard = Guard(model, x, y, threat)
            return Found(guard.settle(self._climb(guard, x, y, threat, threat.project(start, x))), guard.forwards)

    def _climb(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, start: Tensor) -> Tensor:
        """The first image of each climb that fools the model, else the last one."""
        fooling, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def objective(z: Tensor) -> Tensor:
            live = (~fooled).nonzero().flatten()  # a fooled image has what will be returned: it asks no more
            if not len(live):
                return 0 * z.flatten(1).sum(1)
            logits, tried = model(z[live]), z.detach()[live]
            inside = threat.project(tried, x[live])  # the start itself is not yet cut to [0, 1]
            new = (margin(logits.detach(), y[live]) <= 0) & (inside == tried).flatten(1).all(1)
            fooling[live[new]] = tried[new]
            fooled[live[new]] = True
            return z.new_zeros(len(z)).index_put((live,), cross_entropy(logits, y[live]))

        last = ascend(
            objective,
            x,
            threat=threat,
            steps=self.steps,
            step_size=threat.eps * self.step,
            start=start,
        )
        return torch.where(per_image(fooled, x), fooling, last)


ENTRY = PGD
