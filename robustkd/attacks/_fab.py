"""FAB, targeted: steps to the boundary as it would be if the network were linear, drawn towards the clean image.

Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020, algorithm 1; order
of targets, constants and bookkeeping are those of the authors' code (PyPI: pyautoattack), whose queries are repeated.

Departures: an image of which nothing more can be learned leaves its batch at once (see `Guard.settled`), and the projection
for linf finds its step by Newton's method instead of sorting: the same point, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkd.attacks._auto import autoattack
from robustkd.attacks._guard import Guard
from robustkd.losses import margin
from robustkd.threat import ThreatModel, per_image

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
"""Largest weight of the clean image's projection, overshoot, and what remains of the way back after a success."""
_TINY = 1e-8

Project = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Points (N, D) in [0, 1], normals (N, D) and offsets (N,): the shortest ways (N, D) to w p = b within [0, 1]."""


@dataclass(frozen=True)
class Fab:
    """What a search is to do.

    Attributes:
        threat: the ball; a success beyond it counts for nothing.
        steps: for each target.
        targets: the highest of the wrong classes, one after another.
    """

    threat: ThreatModel
    steps: int
    targets: int

    def search(self, model: Guard, x: Tensor, y: Tensor) -> Tensor:
        """One image (N, C, H, W) for each clean one: the nearest that fooled the model inside the ball, else the clean one."""
        found = x.clone()
        with torch.no_grad():
            logits = model(x)
        order, standing = logits.sort(dim=1)[1], logits.argmax(1) == y
        for rank in range(2, self.targets + 2):
            rows = standing.nonzero().flatten()
            if not len(rows):
                break
            images, fooled = self._towards(model, x[rows], y[rows], order[rows, -rank], rows)
            found[rows[fooled]] = images[fooled]
            standing[rows[fooled]] = False
        return found

    def _towards(self, model: Guard, x: Tensor, y: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest image of the target's run for each clean one, and which of them lie in the ball."""
        project = projection(self.threat)
        nearest, distance = x.clone(), self.threat.distance(x, x) + torch.inf
        live, z = torch.arange(len(x), device=x.device), x.clone()
        for _ in range(self.steps):
            if not len(live):
                break
            clean, own = x[live], y[live]
            gap, slope = _slope(model, z, own, target[live])
            z = self._step(project, z, clean, gap, slope)
            with torch.no_grad():
                logits = model(z)
            wrong = logits.argmax(1) != own
            away = self.threat.distance(z, clean)
            better = wrong & (away < distance[live])
            nearest[live[better]], distance[live[better]] = z[better], away[better]
            inside = (wrong & (away <= self.threat.eps)).nonzero().flatten()
            going = torch.ones_like(wrong)
            if len(inside):
                going[inside] = ~model.settled(z[inside], margin(logits[inside], own[inside]), rows[live[inside]])
            z = torch.where(per_image(wrong, z), clean + (z - clean) * BETA, z)[going]
            live = live[going]
        return nearest, distance <= self.threat.eps

    def _step(self, project: Project, z: Tensor, clean: Tensor, gap: Tensor, slope: Tensor) -> Tensor:
        n, shape = len(z), z.shape
        points, normal = torch.cat([z, clean]).flatten(1), slope.flatten(1)
        offset = (normal * z.flatten(1)).sum(1) - gap
        ways = project(points, normal.repeat(2, 1), offset.repeat(2)).view(2 * n, *shape[1:])
        lengths = self.threat.distance(ways, torch.zeros_like(ways)).to(z).clamp_min(_TINY)
        weight = per_image((lengths[:n] / (lengths[:n] + lengths[n:])).clamp(0, ALPHA_MAX), z)
        return ((z + ETA * ways[:n]) * (1 - weight) + (clean + ETA * ways[n:]) * weight).clamp(0, 1)


def _slope(model: Guard, z: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How far the target is ahead of the label, (N,), and the gradient of that."""
    z = z.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(z)
        ahead = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (slope,) = torch.autograd.grad(ahead.sum(), z)
    return ahead.detach(), slope


def projection(threat: ThreatModel) -> Project:
    """The projection of a norm."""
    if threat.norm == "linf":
        return linf
    l2: Project = autoattack("fab_projections").projection_l2
    return l2


def linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """The shortest way in linf: every pixel moves by the same length, or as far as [0, 1] lets it.

    How far that leads is concave in the length, so Newton's method comes from below and ends after finitely many steps;
    where the plane is out of reach every pixel goes as far as it can.
    """
    missing = offsets - (normals * points).sum(1)
    normals = normals * torch.where(missing < 0, -1.0, 1.0).to(normals)[:, None]
    weights, missing = normals.abs(), missing.abs()[:, None]
    reach = torch.where(normals > 0, 1 - points, points)
    length = torch.zeros_like(missing)
    for _ in range(points.shape[1]):
        free = weights * (reach > length)
        slope = free.sum(1, keepdim=True)
        longer = ((missing - (weights - free).mul(reach).sum(1, keepdim=True)) / slope).maximum(length)
        longer = torch.where(slope > 0, longer, torch.inf)
        if torch.equal(longer, length):
            break
        length = longer
    return torch.minimum(reach, length) * normals.sign()
