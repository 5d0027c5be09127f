"""APGD-CE on the 8-bit grid: every query is an 8-bit image, so that what is found survives a camera.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
ICML 2020; steps are those of the authors' code, see `_apgd`. Rounding the images of another attack
afterwards loses what lies below one level: coarse engines then look several points stronger than they are.

Departures: the model sees the nearest 8-bit image, and its gradient is passed straight through the rounding; images
that are settled leave the batch, and an image's starts are its own, see `_apgd`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from robustkd.attacks._apgd import Schedule, auto_pgd
from robustkd.attacks._base import Attack
from robustkd.attacks._grid import anchored, on_grid, rounding
from robustkd.attacks._guard import Guard
from robustkd.attacks._starts import Starts, Whose
from robustkd.threat import ThreatModel


class APGDGrid(Attack, frozen=True):
    """Auto-PGD on 8-bit images."""

    summary: ClassVar[str] = "Auto-PGD on the cross entropy over 8-bit images only"
    needs: ClassVar[Literal["gradient", "logits", "labels"]] = "gradient"
    grid: ClassVar[bool] = True
    per_image: ClassVar[bool] = True
    name: Literal["apgd-grid"] = "apgd-grid"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    starts: Whose = Field("image", description="whose stream a start is drawn from; batch: as the authors do")

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        anchor, inner = anchored(x, threat)
        if inner.eps == 0:
            return on_grid(x, x, threat)

        def settled(z: Tensor, margins: Tensor, rows: Tensor) -> Tensor:
            return model.settled(on_grid(z, x[rows], threat), margins, rows)

        schedule = Schedule(self.steps, self.restarts)
        starts = Starts(x, seed) if self.starts == "image" else None
        found = auto_pgd(lambda z: model(rounding(z)), anchor, y, inner, schedule, seed, settled, starts)
        return on_grid(found, x, threat)


ENTRY = APGDGrid
