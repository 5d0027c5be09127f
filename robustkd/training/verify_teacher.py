"""A teacher measured after loading: does it answer as its card says? This is what finds wrong normalisation.

Clean accuracy and PGD-10 on a sample of the test images, against the figures as published or measured. A sample has
noise, and the published figures are of other images: a figure is contradicted only when it lies outside an exact
99.9 % interval (Clopper & Pearson, 1934) and two points beyond it.
"""

from __future__ import annotations

import torch
from torch import nn

from robustkd.datasets._base import ImageSet, balanced
from robustkd.errors import NumericsError
from robustkd.recipe.schema import Figures, VerifyConfig
from robustkd.signals import check
from robustkd.stats import clopper_pearson
from robustkd.threat import ThreatModel
from robustkd.training.evaluate import evaluate

ALPHA = 0.001
SLACK = 0.02
BATCH = 100


def verify_teacher(
    net: nn.Module,
    said: Figures,
    images: ImageSet,
    threat: ThreatModel | None,
    *,
    name: str,
    where: str,
    device: torch.device,
    sample: VerifyConfig,
) -> str:
    """Measure a teacher against what is said of it. No other randomness is touched: seeds are its own.

    Args:
        net: in eval mode, on `device`.
        said: accuracies as fractions.
        images: the test split.
        threat: what the robust figures hold for; None measures clean images only.
        name: of the teacher.
        where: its file.
        device: where it runs.
        sample: how many images, clean and attacked.

    Returns:
        A sentence with what was measured.

    Raises:
        NumericsError: it lies outside what is said.
    """
    told = [_clean(net, images, said, name=name, where=where, device=device, n=sample.clean)]
    if threat is not None and sample.pgd10 and (said.pgd10 is not None or said.autoattack is not None):
        part = images.take(balanced(images.labels, min(sample.pgd10, len(images)), seed=0))
        robust = round(evaluate(net, part, threat, seed=0, device=device, batch=BATCH).robust * len(part))
        told.append(_hold("PGD-10", robust, len(part), said, name=name, where=where))
    return f"teacher {name}: {', '.join(told)}; as expected"


def _clean(net: nn.Module, images: ImageSet, said: Figures, *, name: str, where: str, device: torch.device, n: int) -> str:
    part = images.take(balanced(images.labels, min(n, len(images)), seed=0))
    x, y = torch.from_numpy(part.floats()), torch.from_numpy(part.labels)
    right = 0
    with torch.no_grad():
        for first in range(0, len(part), BATCH):
            check()
            a, b = x[first : first + BATCH].to(device), y[first : first + BATCH].to(device)
            right += int((net(a).argmax(1) == b).sum())
    return _hold("clean", right, len(part), said, name=name, where=where)


def _hold(kind: str, right: int, n: int, said: Figures, *, name: str, where: str) -> str:
    """The figure in words, if it agrees. AutoAttack is the stronger attack: its figure is only a floor of PGD-10's."""
    low, high = clopper_pearson(right, n, ALPHA)
    wanted = said.clean if kind == "clean" else said.pgd10
    floor = wanted if wanted is not None or kind == "clean" else said.autoattack
    too_low = floor is not None and high + SLACK < floor
    if too_low or (wanted is not None and low - SLACK > wanted):
        raise NumericsError(
            f"teacher {name} is not what its card says: {kind} {right / n:.1%} of {n} images, expected {floor:.1%}",
            where=where,
            fix="check normalisation (model.normalize), file, class order and image range; or add --no-verify-teacher",
        )
    return f"{kind} {right / n:.1%} of {n} images"
