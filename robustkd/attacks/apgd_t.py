"""APGD-T: Auto-PGD on the targeted difference-of-logits ratio, one run per target class.

DLR-T(x, y, t) = -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2) with the logits sorted downwards. Croce and Hein, ICML
2020; steps are those of the authors' code, see `_apgd`. The ratio does not change with the scale of the logits.

Departures: targets are capped at classes - 1; with fewer than 4 classes the ratio does not exist and the
attack is left out, where the original stops with an IndexError; images that are settled leave the batch, and an
image's starts are its own, see `_apgd`.
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


class APGDT(Attack, frozen=True):
    """Auto-PGD on the targeted DLR loss."""

    summary: ClassVar[str] = "Auto-PGD on the targeted DLR loss, step for step the authors' AutoAttack; needs 4 classes"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    per_image: ClassVar[bool] = True
    name: Literal["apgd-t"] = "apgd-t"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    starts: Whose = Field("image", description="whose stream a start is drawn from; batch: as the authors do")
    targets: int = Field(9, ge=1, description="capped at classes - 1")

    def obstacle(self, classes: int) -> str:
        """The ratio needs four logits."""
        return f"the targeted DLR loss needs 4 classes, there are {classes}" if classes < 4 else ""

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        schedule = Schedule(self.steps, self.restarts, min(self.targets, model.classes - 1))
        starts = Starts(x, seed) if self.starts == "image" else None
        return auto_pgd(model, x, y, threat, schedule, seed, model.settled, starts)


ENTRY = APGDT
