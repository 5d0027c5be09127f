"""Normalisation Loss Balance: the weights of two losses follow how far each has fallen since the first batch.

Of MTARD and B-MTARD (methods.md, 5.1 and 5.2). Losses enter as plain numbers, so no gradient passes through a weight.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustkd.methods._base import Terms

#: a loss below it counts as this much: one that starts at zero must not take all the weight for ever after. It is the
#: value that the released code's floor gives to two equal distributions.
LEAST = 1e-5

B = TypeVar("B", bound="Balance")


@dataclass(frozen=True)
class Balance:
    """The weights of the adversarial and the clean loss, and both losses of the run's first batch (None before it)."""

    w_adv: float = 0.5
    w_nat: float = 0.5
    first_adv: float | None = None
    first_nat: float | None = None

    def balanced(self: B, adv: float, nat: float, *, eta: float, b: float = 1.0, least: float = LEAST) -> B:
        """The weights after losses `adv` and `nat`, which are means over all processes.

        l_k = L_k / L0_k; r_nat = l_nat^b / (l_nat^b + l_adv^b); w_nat <- w_nat - eta (w_nat - r_nat); w_adv = 1 - w_nat.
        """
        adv, nat = max(adv, least), max(nat, least)  # in this order NaN stays NaN, which stops the run
        first_adv = adv if self.first_adv is None else self.first_adv
        first_nat = nat if self.first_nat is None else self.first_nat
        # in logarithms: no power of a ratio overflows, and equal ratios give one half exactly
        lead = b * (math.log(nat / first_nat) - math.log(adv / first_adv))
        w_nat = self.w_nat - eta * (self.w_nat - _sigmoid(lead))
        return replace(self, w_adv=1 - w_nat, w_nat=w_nat, first_adv=first_adv, first_nat=first_nat)

    def join(self, parts: Tensor) -> Tensor:
        """w_adv L_adv + w_nat L_nat of parts (2,), in this order."""
        return self.w_adv * parts[0] + self.w_nat * parts[1]

    def weights(self) -> dict[str, float]:
        """The weights by name, for the log."""
        return {"w_adv": self.w_adv, "w_nat": self.w_nat}

    def save(self) -> dict[str, Any]:
        """All fields as JSON; Python floats come back to the last bit."""
        return asdict(self)


def _sigmoid(z: float) -> float:
    e = math.exp(-abs(z))
    return 1 / (1 + e) if z >= 0 else e / (1 + e)


def numbers(terms: Terms, *names: str) -> list[float]:
    """The terms of these names as numbers: one wait for a GPU instead of one each."""
    values: list[float] = torch.stack([terms[name] for name in names]).tolist()
    return values
