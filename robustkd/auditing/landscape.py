"""The engine's loss around some images: along the direction that the attacks take, and along a random one.

A picture for the reader and one figure: on how many grid points the loss falls when the image moves along the gradient.
Masked gradients show as about half; a loss that the gradient describes rises nearly everywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustkd.auditing import evidence
from robustkd.auditing.effort import sample
from robustkd.auditing.plan import seed_of
from robustkd.auditing.probes import Kind
from robustkd.auditing.steps import Job
from robustkd.recipe.policy import Policy
from robustkd.result import Landscape

#: points along each direction, from -eps to eps
POINTS = 21


def landscape(job: Job, policy: Policy, kind: Kind) -> Landscape | None:
    """The loss on the grid of every image of the sample, or None where there is none, no gradient, or no score."""
    surrogate, index = job.models.get("surrogate"), sample(job, policy.landscape_images)
    if not (len(index) and isinstance(surrogate, nn.Module) and job.threat.eps > 0 and kind != "labels"):
        return None
    x, y = job.tensors(index)
    steep = job.threat.step(torch.nan_to_num(evidence.gradient(surrogate, x, y))).cpu().numpy()
    along = np.linspace(-job.threat.eps, job.threat.eps, POINTS)
    grids = [_grid(job, int(i), steep[k], along, logs=kind == "probabilities") for k, i in enumerate(index)]
    falling = [float((~(grid[1:] >= grid[:-1])).mean()) for grid in grids]
    return Landscape(
        images=tuple(index.tolist()),
        along=tuple(along.tolist()),
        loss=tuple(tuple(tuple(_short(v) for v in row) for row in grid.tolist()) for grid in grids),
        falling=float(np.mean(falling)),
    )


def _grid(job: Job, image: int, steep: NDArray[np.float32], along: NDArray[np.float64], *, logs: bool) -> NDArray[np.float64]:
    """(POINTS, POINTS): rows move along the gradient, columns along a random sign direction of the same length."""
    signs = np.random.default_rng(seed_of(job.seed, "landscape", image)).choice([-1.0, 1.0], steep.shape)
    other = signs if job.threat.norm == "linf" else signs / np.sqrt(signs.size)
    moves = along[:, None, None, None, None] * steep + along[None, :, None, None, None] * other
    images = np.clip(job.x[image] + moves, 0, 1).astype(np.float32).reshape(-1, *steep.shape)
    y = torch.full((len(images),), int(job.y[image]))
    start = torch.from_numpy(job.x[image][None])
    loss = evidence.losses(job.engine, torch.from_numpy(images), y, like=start, logs=logs)
    return loss.numpy().reshape(POINTS, POINTS)


def _short(value: float) -> float | None:
    """Six digits; None where the engine gave no number."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
