"""Pure per-example losses on logits. Each takes (N, C) and returns (N,), computed in at least float32.

Softmax, KL and entropy stay in float32 under mixed precision (methods.md, section 1.8). The divergence is
the forward one throughout: the reference (teacher) comes first, the student second (section 1.2).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["bmean", "emean", "sum"]


def full(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 where they are already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """CE(z, y) = -log softmax(z)_y for each image."""
    return F.cross_entropy(full(logits), y, reduction="none")


def kl(reference: Tensor, logits: Tensor, *, tau: float = 1.0) -> Tensor:
    """KL( softmax(reference / tau) || softmax(logits / tau) ) for each image; no tau^2 factor.

    Gradient flows into both arguments; detach the reference where the method does.
    """
    log_p = F.log_softmax(full(reference) / tau, dim=1)
    log_q = F.log_softmax(full(logits) / tau, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def reduce(per_image: Tensor, how: Reduction, *, classes: int) -> Tensor:
    """Section 1.2: `sum`, `bmean` (sum over images / B) or `emean` (the mean over all B * C entries)."""
    if how == "sum":
        return per_image.sum()
    return per_image.mean() / (classes if how == "emean" else 1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{c != y} z_c for each image: positive where the label wins strictly."""
    logits = full(logits)
    label = logits.gather(1, y[:, None]).squeeze(1)
    rest = logits.scatter(1, y[:, None], float("-inf")).amax(1)
    return label - rest


def entropy(logits: Tensor) -> Tensor:
    """The entropy of softmax(z) in nats for each image."""
    log_p = F.log_softmax(full(logits), dim=1)
    return -(log_p.exp() * log_p).sum(1)
