"""Square: random search with square-shaped changes; reads logits, needs no gradient.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV
2020; the authors' own code (PyPI: pyautoattack).

Departures: exact ties are broken by class index in the order of argmax, because the original stops at a margin
of 0 and then throws the tied image away; on int8 engines that hid a fifth of what it can break.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustkd.attacks._auto import autoattack, common
from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.threat import ThreatModel


class Square(Attack, frozen=True):
    """Score-based random search."""

    summary: ClassVar[str] = "random search that reads only logits, from the authors' AutoAttack"
    needs: ClassVar[Literal["gradient", "logits"]] = "logits"
    name: Literal["square"] = "square"
    queries: int = Field(5000, ge=1)

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        model.untie()
        attack = autoattack("square").SquareAttack(
            model,
            n_queries=self.queries,
            n_restarts=1,
            p_init=0.8,
            resc_schedule=False,
            device=x.device,
            **common(threat, seed),
        )
        found: Tensor = attack.perturb(x, y)
        return found


ENTRY = Square
