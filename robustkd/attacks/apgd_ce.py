"""APGD-CE: projected gradient ascent on the cross entropy whose step halves when the loss stops rising.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks", ICML 2020; the authors' own code (PyPI: pyautoattack). Departures: none; 100 steps are the standard.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustkd.attacks._auto import QUIET, autoattack, common
from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.threat import ThreatModel


class APGDCE(Attack, frozen=True):
    """Auto-PGD on the cross entropy."""

    summary: ClassVar[str] = "Auto-PGD on the cross entropy, from the authors' AutoAttack"
    needs: ClassVar[Literal["gradient", "logits"]] = "gradient"
    name: Literal["apgd-ce"] = "apgd-ce"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        attack = autoattack("autopgd_base").APGDAttack(
            model,
            n_iter=self.steps,
            n_restarts=self.restarts,
            loss="ce",
            device=x.device,
            logger=QUIET,
            **common(threat, seed),
        )
        found: Tensor = attack.perturb(x, y)
        return found


ENTRY = APGDCE
