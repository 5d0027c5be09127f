"""Square: random search with square-shaped changes; reads logits, needs no gradient.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV
2020; the authors' own code (PyPI: pyautoattack).

Departures: exact ties are broken by class index in the order of argmax, because the original stops at a margin
of 0 and then throws the tied image away; on int8 engines that hid a fifth of what it can break. In l2 the original lays
its first grid beyond the edge of images of some sizes (12, 14, 18, 19 or 24 pixels, and many that are not square) and stops
with an error; there our own repetition of the same search runs (`robustkd.attacks._square`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustkd.attacks._auto import NORMS, autoattack
from robustkd.attacks._base import Attack
from robustkd.attacks._guard import Guard
from robustkd.attacks.square_ties import SquareTies
from robustkd.threat import ThreatModel


class Square(Attack, frozen=True):
    """Score-based random search."""

    summary: ClassVar[str] = "random search that reads only logits, from the authors' AutoAttack"
    needs: ClassVar[Literal["gradient", "logits"]] = "logits"
    name: Literal["square"] = "square"
    queries: int = Field(5000, ge=1)

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        model.untie()
        if threat.norm == "l2" and not _grid_fits(*x.shape[2:]):
            return SquareTies(queries=self.queries, accept_equal=False)._search(model, x, y, threat, seed)
        attack = autoattack("square").SquareAttack(
            model,
            n_queries=self.queries,
            n_restarts=1,
            p_init=0.8,
            resc_schedule=False,
            device=x.device,
            norm=NORMS[threat.norm],
            eps=threat.eps,
            seed=seed,
            verbose=False,
        )
        draws = _Draws(attack, seed)
        attack.random_choice, attack.random_int, attack.eta = draws.signs, draws.place, draws.pattern
        found: Tensor = attack.perturb(x, y)
        return found


class _Draws:
    """The random numbers that the authors' code draws from torch's global state, the same ones, from a state of their own.

    Args:
        attack: the authors' attack.
        seed: of all its randomness.
    """

    def __init__(self, attack: Any, seed: int) -> None:
        self._attack, self._rng = attack, torch.Generator().manual_seed(seed)

    def _drawn(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=self._rng).to(self._attack.device)

    def signs(self, shape: Sequence[int]) -> Tensor:
        """Ones of either sign."""
        return torch.sign(2 * self._drawn(shape) - 1)

    def place(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
        """Whole numbers from `low` on, below `high`."""
        return (low + (high - low) * self._drawn(shape)).long()

    def pattern(self, s: int) -> Tensor:
        """A window's pattern in l2, (s, s), upright or turned."""
        upper, lower = self._attack.eta_rectangles(s // 2, s), self._attack.eta_rectangles(s - s // 2, s)
        delta = torch.cat([upper, -1.0 * lower])
        delta /= (delta**2).sum(dim=(0, 1), keepdim=True).sqrt()
        return delta.T if bool(self._drawn((1,)) > 0.5) else delta


def _grid_fits(height: int, width: int) -> bool:
    """Whether the authors' tiles end inside the image; those of one pixel may lie outside, where they are empty."""
    tile = height // 5
    if tile < 2:
        return tile == 1
    first = (height - 5 * tile) // 2
    return all(first + size // tile * tile <= size for size in (height, width))


ENTRY = Square
