"""Square for engines with coarse outputs: ties count as broken, plateaus are crossed, every image has its own stream.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020,
algorithm 1 with the sampling of algorithm 2 (linf) and of algorithm 3 (l2), on the margin loss.

Departures from the authors' code: a proposal of equal margin is accepted (the outputs of an int8 engine are
plateaus, on which strict improvement stands still); success is a margin that is not strictly positive, as the audit
judges; the randomness of an image is a hash of the seed, of the image and of the query, so that batch, order and shard
cannot change a result (the authors' places, and in l2 the turn of the pattern, are the same for a whole batch); broken
images leave the batch at once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.attacks._square import Moves, Squares, Windows
from robustkd.attacks._streams import Streams
from robustkd.losses import margin
from robustkd.threat import ThreatModel


class SquareTies(Attack, frozen=True):
    """Score-based random search that is not stopped by ties and plateaus."""

    summary: ClassVar[str] = "Square of our own for coarse outputs: ties are broken images, equal margins are accepted"
    needs: ClassVar[Literal["gradient", "logits", "labels"]] = "logits"
    per_image: ClassVar[bool] = True
    name: Literal["square-ties"] = "square-ties"
    queries: int = Field(5000, ge=1)
    p_init: float = Field(0.8, gt=0, le=1, description="part of the image that the first squares cover")
    accept_equal: bool = Field(True, description="take a proposal that is no worse; the authors' code wants a better one")

    @torch.no_grad()
    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        kind = Squares if threat.norm == "linf" else Windows
        moves: Moves = kind(x, threat.eps, self.p_init, Streams(x, seed))
        best = moves.start()
        lowest = margin(model(best), y)
        for query in range(1, self.queries + 1):
            live = (lowest > 0).nonzero().flatten()
            if not len(live):
                break
            tried = moves.tried(query, live, best[live])
            found = margin(model(tried), y[live])
            better = (found <= lowest[live]) if self.accept_equal else (found < lowest[live]) | (found <= 0)
            taken = live[better]
            best[taken], lowest[taken] = tried[better], found[better]
        return best


ENTRY = SquareTies
