"""APGD-CE: projected gradient ascent on the cross entropy whose step halves when the loss stops rising.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks", ICML 2020; 100 steps are the standard. Departures: images that are settled leave the batch, and an image's start
is its own, see `_apgd`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustkd.attacks._apgd import Schedule, auto_pgd
from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.attacks._starts import Starts, Whose
from robustkd.threat import ThreatModel


class APGDCE(Attack, frozen=True):
    """Auto-PGD on the cross entropy."""

    summary: ClassVar[str] = "Auto-PGD on the cross entropy, step for step the authors' AutoAttack"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    per_image: ClassVar[bool] = True
    name: Literal["apgd-ce"] = "apgd-ce"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    starts: Whose = Field("image", description="whose stream a start is drawn from; batch: as the authors do")

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        schedule = Schedule(self.steps, self.restarts)
        starts = Starts(x, seed) if self.starts == "image" else None
        return auto_pgd(model, x, y, threat, schedule, seed, model.settled, starts)


ENTRY = APGDCE
