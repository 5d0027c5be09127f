"""FAB-T: the fast adaptive boundary attack, targeted; looks for the smallest change that crosses a boundary.

Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020; the
authors' own code (PyPI: pyautoattack). Departures: targets are capped at classes - 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustkd.attacks._auto import autoattack, common
from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.threat import ThreatModel


class FABT(Attack, frozen=True):
    """Targeted fast adaptive boundary attack."""

    summary: ClassVar[str] = "targeted fast adaptive boundary attack, from the authors' AutoAttack"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    per_image: ClassVar[bool] = True
    """It starts at the image itself: nothing is drawn."""
    name: Literal["fab-t"] = "fab-t"
    steps: int = Field(100, ge=1)
    targets: int = Field(9, ge=1, description="capped at classes - 1")

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        attack = autoattack("fab_pt").FABAttack_PT(
            model,
            n_iter=self.steps,
            n_restarts=1,
            targeted=True,
            n_target_classes=min(self.targets, model.classes - 1),
            device=x.device,
            **common(threat, seed),
        )
        found: Tensor = attack.perturb(x, y)
        return found


ENTRY = FABT
