"""Compare checkpoints on many test images by three 20-step PGD attacks: quicker than AutoAttack, and paired.

    python -m bench.yardstick 2000 runs/quickstart runs/quickstart-pgd-at

An image is robust if none of PGD-20 on cross entropy, margin and DLR breaks it (step eps/4, uniform start). The first run
is held against each of the others image by image, with the exact McNemar test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from robustkd.ascent import ascend
from robustkd.bundle import Bundle
from robustkd.datasets._open import open_dataset
from robustkd.losses import cross_entropy, margin
from robustkd.models._files import load_net
from robustkd.stats import mcnemar_exact, wilson
from robustkd.threat import ThreatModel

BATCH, STEPS = 250, 20
Loss = Callable[[Tensor, Tensor], Tensor]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio with a detached denominator, (N,)."""
    ranked = logits.sort(1, descending=True).values
    return -margin(logits, y) / (ranked[:, 0] - ranked[:, 2]).detach().clamp_min(1e-6)


LOSSES: tuple[Loss, ...] = (cross_entropy, lambda logits, y: -margin(logits, y), dlr)


def flags(checkpoint: Path, n: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Clean and robust flags of the first n test images."""
    bundle = Bundle.open(checkpoint, kind="checkpoint")
    net = load_net(bundle).requires_grad_(False)
    images = open_dataset(bundle.manifest.recipe["dataset"]).load("test")
    threat = bundle.manifest.threat or ThreatModel()
    right, robust = [], []
    for first in range(0, min(n, len(images)), BATCH):
        part = images.take(np.arange(first, min(first + BATCH, n, len(images))))
        x, y = torch.from_numpy(part.floats()), torch.from_numpy(part.labels)
        alive = net(x).argmax(1) == y
        right.append(alive.numpy().copy())
        for loss in LOSSES:
            rng = Generator().manual_seed(first)

            def objective(z: Tensor, loss: Loss = loss, y: Tensor = y) -> Tensor:
                return loss(net(z), y)

            x_adv = ascend(objective, x, threat=threat, steps=STEPS, step_size=threat.eps / 4, start="uniform", rng=rng)
            alive &= net(x_adv).argmax(1) == y
        robust.append(alive.numpy())
    return np.concatenate(right), np.concatenate(robust)


def main(n: int, runs: list[Path]) -> None:
    """Print one line a run; the first is what the others are held against."""
    base: NDArray[np.bool_] | None = None
    for run in runs:
        clean, robust = flags(run / "checkpoint", n)
        low, high = wilson(int(robust.sum()), len(robust))
        line = f"{run}: n {len(robust)}, clean {clean.mean():.1%}, robust {robust.mean():.1%} ({low:.1%} to {high:.1%})"
        if base is None:
            base = robust
        else:
            b, c = int((base & ~robust).sum()), int((robust & ~base).sum())
            line += f"; first robust and this broken {b}, the reverse {c}, McNemar p {mcnemar_exact(b, c):.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
