"""FAB-T: the fast adaptive boundary attack, targeted; looks for the smallest change that crosses a boundary.

Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020; our own
repetition of the authors' code (`robustkd.attacks._fab`). Departures: targets are capped at classes - 1, and an image leaves as
soon as nothing more can be learned of it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._fab import Fab
from robustkd.attacks._guard import Guard
from robustkd.threat import ThreatModel


class FABT(Attack, frozen=True):
    """Targeted fast adaptive boundary attack."""

    summary: ClassVar[str] = "targeted fast adaptive boundary attack, as in AutoAttack"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    per_image: ClassVar[bool] = True
    """It starts at the image itself: nothing is drawn."""
    name: Literal["fab-t"] = "fab-t"
    steps: int = Field(100, ge=1)
    targets: int = Field(9, ge=1, description="capped at classes - 1")

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        return Fab(threat, self.steps, min(self.targets, model.classes - 1)).search(model, x, y)


ENTRY = FABT
