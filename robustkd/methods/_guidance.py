"""What IGDM and SAAD compute from a robust teacher at x'; shared by their add-ons and by the method `saad`.

IGDM (Lee et al., ICLR 2025; methods.md, 6.1) and SAAD (Lee & Chung, TMLR 2026; 6.2).
"""

from __future__ import annotations

from torch import Tensor

from robustkd.losses import entropy, full, kl
from robustkd.methods._base import Batch, Clock


def mirrored(batch: Batch) -> Tensor:
    """The point x - d for d = x' - x, not clamped to [0, 1]; float32 at least."""
    x = full(batch.x)
    return x - (full(batch.x_adv) - x)


def difference_gap(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
    """KL( softmax(dT) || softmax(dS) ) for each image, with d the difference of the logits at x' and at x - d.

    Args:
        teacher: logits (N, C) at x' and at x - d.
        student: the same of the student.
    """
    return kl(full(teacher[0]) - full(teacher[1]), full(student[0]) - full(student[1]))


def ramp(alpha: float, clock: Clock) -> float:
    """IGDM's coefficient alpha * epoch / E with epochs counted from 1: alpha / E in the first, alpha in the last."""
    return alpha * (clock.epoch + 1) / clock.epochs


def excess_entropy(logits: Tensor, *, scale: float, lowest: Tensor | None = None) -> Tensor:
    """SAAD's weights w_i = scale * (H_i - min H) (N,) .

    Args:
        logits: the teacher's on x' (N, C).
        scale: of the weights; SAAD has 5.
        lowest: the smallest entropy of the whole batch, where these images are a part of it.
    """
    found = entropy(logits)
    return scale * (found - (found.min() if lowest is None else lowest))
