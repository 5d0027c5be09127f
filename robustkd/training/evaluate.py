"""Clean and PGD-10 accuracy on held-out images, for checkpoint selection and for the progress line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkd.ascent import ascend, attacking
from robustkd.datasets._base import ImageSet
from robustkd.losses import cross_entropy
from robustkd.signals import check
from robustkd.threat import ThreatModel
from robustkd.training.seeds import generator

STEPS = 10


@dataclass(frozen=True)
class Accuracy:
    """Fractions of the held-out images; `robust` is under PGD-10 (CE, uniform start, step eps/4)."""

    clean: float
    robust: float

    def score(self, select: str) -> float:
        """What `best` means: robust accuracy, clean accuracy, or their mean."""
        return {"pgd10": self.robust, "clean": self.clean, "weighted": (self.clean + self.robust) / 2}[select]


def evaluate(
    net: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    seed: int,
    device: torch.device,
    batch: int = 250,
    quick: nn.Module | None = None,
) -> Accuracy:
    """Accuracy of a network in eval mode; images it gets wrong when clean are not attacked.

    `quick` computes the same, faster: it is attacked in the network's place, and the network answers.
    """
    clean = robust = 0
    x_all, y_all = torch.from_numpy(images.floats()), torch.from_numpy(images.labels)
    with attacking(net, "eval"):
        for first in range(0, len(images), batch):
            check()
            x, y = x_all[first : first + batch].to(device), y_all[first : first + batch].to(device)
            right = _right(net, x, y)
            clean += int(right.sum())
            if bool(right.any()):
                x, y = x[right], y[right]
                x_adv = _attacked(quick or net, x, y, threat, seed + first, device)
                robust += int(_right(net, x_adv, y).sum())
    return Accuracy(clean / len(images), robust / len(images))


@torch.no_grad()
def _right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    right: Tensor = net(x).argmax(1) == y
    return right


def _attacked(net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int, device: torch.device) -> Tensor:
    return ascend(
        lambda z: cross_entropy(net(z), y),
        x,
        threat=threat,
        steps=STEPS,
        step_size=threat.eps / 4,
        start="uniform",
        rng=generator(seed, device=device),
    )
