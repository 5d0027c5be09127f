"""Exact KL, and the form of the RSLAD family's released code with 1e-5 inside the teacher's logarithm (methods.md, 1.2).

The floor changes values by about 1e-5 per entry and no gradient of the student. `variant: code` has it for the sake of
what is derived from values: loss ratios and entropies.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from robustkd.losses import entropy, full, kl

Variant = Literal["fixed", "code"]
FLOOR = 1e-5


def divergence(teacher: Tensor, logits: Tensor, variant: Variant) -> Tensor:
    """KL(softmax(teacher) || softmax(logits)) for each image, (N, C) twice -> (N,).

    `code` is sum_c p (log(p + 1e-5) - log q), the mean of which over images and classes is the "soft-floor" mean.
    """
    if variant == "fixed":
        return kl(teacher, logits)
    p = full(teacher).softmax(1)
    return (p * ((p + FLOOR).log() - full(logits).log_softmax(1))).sum(1)


def disorder(logits: Tensor, variant: Variant) -> Tensor:
    """The entropy of softmax(logits) in nats for each image, (N, C) -> (N,); `code` with 1e-5 inside the logarithm.

    With the floor the entropy of a certain distribution is slightly negative.
    """
    if variant == "fixed":
        return entropy(logits)
    p = full(logits).softmax(1)
    return -(p * (p + FLOOR).log()).sum(1)
