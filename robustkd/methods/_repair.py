"""Three ways to repair a teacher's prediction where it is wrong: DGAD's exchange, and the alternatives of its ablation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from robustkd.losses import full

Repair = Literal["swap", "smooth", "mix"]


def repaired(logits: Tensor, y: Tensor, rows: Tensor, *, how: Repair, share: float) -> Tensor:
    """The teacher's logits with the given rows repaired; other rows keep their distribution (`swap`: their bits).

    Args:
        logits: (N, C).
        y: labels (N,).
        rows: (N,) bool.
        how: `swap` exchanges the label's logit with the largest one; `smooth` puts (1 - share) onehot(y) + share / C in
            place of the distribution, `mix` (1 - share) onehot(y) + share softmax(logits).
        share: of what is not the label, in (0, 1).
    """
    if how == "swap":
        return exchange(logits, y, rows)
    log_p = full(logits).log_softmax(1)
    # in logarithms, so that a class of vanishing probability stays finite
    rest = math.log(share) + (log_p if how == "mix" else torch.full_like(log_p, -math.log(log_p.shape[1])))
    label = y[:, None]
    certain = torch.full_like(rest[:, :1], math.log1p(-share))
    target = rest.scatter(1, label, torch.logaddexp(rest.gather(1, label), certain))
    return target.where(rows[:, None], log_p)


def exchange(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """ELS: in the given rows exchange the label's logit with the largest one; other rows stay bit-identical.

    Args:
        logits: (N, C).
        y: labels (N,).
        rows: (N,) bool.
    """
    top = logits.argmax(1, keepdim=True)
    label = y[:, None]
    swapped = logits.scatter(1, label, logits.gather(1, top)).scatter(1, top, logits.gather(1, label))
    return swapped.where(rows[:, None], logits)
