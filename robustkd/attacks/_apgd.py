"""Auto-PGD: projected gradient ascent whose step halves where the loss stops rising; images may leave once they are settled.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks", ICML
2020, algorithm 1; steps, random starts, losses, checkpoints and halving rule are those of the authors' code (PyPI:
pyautoattack), of which every query is repeated bit by bit as long as no image leaves.

Departures: an image of which nothing more can be learned leaves its batch at once, where the original carries it to the
last step (see `Guard.settled`). The others go on as they would have: no image meets another. As attacks of the shelf each
image draws its starts from a stream of its own; the original draws them for the batch, whose size then changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import product

import torch
from torch import Generator, Tensor

from robustkd.attacks._starts import Starts
from robustkd.losses import cross_entropy, margin
from robustkd.threat import ThreatModel, per_image

#: share of steps that must raise the loss between two checkpoints
RHO = 0.75
#: weight of the new step against the momentum of the last one
STEP_WEIGHT = 0.75
_TINY = 1e-12

Settled = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images that fool the model, their margins and their rows: which of them need not go on."""


@dataclass(frozen=True)
class Schedule:
    """How long Auto-PGD runs: `targets` is 0 for the cross entropy, else the number of targets of the DLR loss."""

    steps: int = 100
    restarts: int = 1
    targets: int = 0

    @property
    def first_check(self) -> int:
        """Steps until the first checkpoint."""
        return max(int(0.22 * self.steps), 1)

    def next_check(self, last: int) -> int:
        """Steps between the next two checkpoints."""
        return max(last - max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1))


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), logits sorted downwards: the difference-of-logits ratio, (N,)."""
    ordered = logits.sort(dim=1)[0]
    rows = torch.arange(len(logits), device=logits.device)
    gap = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4])
    return -(logits[rows, y] - logits[rows, target]) / (gap + _TINY)


def auto_pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    schedule: Schedule,
    seed: int,
    settled: Settled,
    starts: Starts | None = None,
) -> Tensor:
    """One image (N, C, H, W) per clean image: the last one that fooled the model before it left, else the clean one.

    Args:
        model: images to logits; a `Guard`, or one seen through a lens.
        x: clean images; those the model gets wrong are not attacked.
        y: their labels.
        threat: the ball.
        schedule: steps, restarts, targets.
        seed: of the random starts, where they are drawn for the batch.
        settled: which fooling images need not go on.
        starts: of each image; left out, they are drawn for the batch, as in the authors' code.
    """
    rng = Generator().manual_seed(seed)
    found = x.clone()
    with torch.no_grad():
        logits = model(x)
    order = logits.sort(dim=1)[1]
    standing = logits.argmax(1) == y
    ranks = range(2, schedule.targets + 2) if schedule.targets else (0,)
    for run, (rank, _) in enumerate(product(ranks, range(schedule.restarts))):
        rows = standing.nonzero().flatten()
        if not len(rows):
            return found
        target = order[rows, -rank] if rank else None
        noise = _drawn(x[rows], threat, rng) if starts is None else _noise(starts, run, threat)[rows]
        fooled, images = _run(model, x[rows], y[rows], target, threat, schedule, noise, _of(settled, rows))
        found[rows[fooled]] = images[fooled]
        standing[rows[fooled]] = False
    return found


def _of(settled: Settled, rows: Tensor) -> Settled:
    return lambda z, margins, at: settled(z, margins, rows[at])


@dataclass
class _Climb:
    """What one run knows of each image that is still in it; every field has a row per image."""

    at: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    z: Tensor
    before: Tensor
    grad: Tensor
    best: Tensor
    best_grad: Tensor
    best_loss: Tensor
    loss: Tensor
    rises: Tensor
    checked_loss: Tensor
    reduced: Tensor
    step: Tensor

    def keep(self, flags: Tensor) -> None:
        """Drop the other images."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[flags])

    def enter(self, loss: Tensor, grad: Tensor) -> None:
        """The loss and the gradient of the newest images."""
        self.rises += loss > self.loss
        self.loss, self.grad = loss, grad
        better = loss > self.best_loss
        self.best[better], self.best_grad[better], self.best_loss[better] = self.z[better], grad[better], loss[better]

    def check(self, period: int) -> None:
        """Halve the step, and go back to the best image, where the loss rose too seldom or not at all since the last check."""
        stuck = (self.rises <= period * RHO) | (~self.reduced & (self.checked_loss >= self.best_loss))
        self.reduced, self.checked_loss = stuck, self.best_loss.clone()
        self.rises.zero_()
        self.step[stuck] /= 2
        self.z[stuck], self.grad[stuck] = self.best[stuck], self.best_grad[stuck]


def _run(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    threat: ThreatModel,
    schedule: Schedule,
    noise: Tensor,
    settled: Settled,
) -> tuple[Tensor, Tensor]:
    """One start: which images were fooled, and the last fooling image of each."""
    fooled, images = torch.zeros(len(x), dtype=torch.bool, device=x.device), x.clone()

    def ask(z: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(z)
            loss = dlr_targeted(logits, y, target) if schedule.targets else cross_entropy(logits, y)
            (grad,) = torch.autograd.grad(loss.sum(), z)
        return loss.detach(), grad, margin(logits.detach(), y)

    z, goal = _start(x, threat, noise), y if target is None else target
    loss, grad, margins = ask(z, y, goal)
    step = per_image(torch.full_like(loss, 2.0 * threat.eps), x)
    zero = torch.zeros_like(loss)
    climb = _Climb(
        at=torch.arange(len(x), device=x.device),
        x=x,
        y=y,
        target=goal,
        z=z,
        before=z.clone(),
        grad=grad,
        best=z.clone(),
        best_grad=grad.clone(),
        best_loss=loss.clone(),
        loss=zero,  # as in the authors' code: the first step is held against 0, not against the start
        rises=zero.clone(),
        checked_loss=loss.clone(),
        reduced=torch.ones_like(loss, dtype=torch.bool),
        step=step,
    )
    period, since = schedule.first_check, 0
    for i in range(schedule.steps + 1):
        if i:
            climb.z, climb.before = _move(climb, threat, 1.0 if i == 1 else STEP_WEIGHT), climb.z
            loss, grad, margins = ask(climb.z, climb.y, climb.target)
            climb.enter(loss, grad)
        wrong = margins <= 0
        if bool(wrong.any()):
            rows = climb.at[wrong]
            fooled[rows], images[rows] = True, climb.z[wrong]
            leaving = wrong.clone()
            leaving[wrong] = settled(climb.z[wrong], margins[wrong], rows)
            if bool(leaving.any()):
                climb.keep(~leaving)
                if not len(climb.at):
                    break
        since += i > 0
        if since == period:
            climb.check(period)
            period, since = schedule.next_check(period), 0
    return fooled, images


def _drawn(x: Tensor, threat: ThreatModel, rng: Generator) -> Tensor:
    """The authors' draw for a batch; on the CPU, so that devices agree."""
    if threat.norm == "linf":
        return (2 * torch.rand(x.shape, generator=rng) - 1).to(x.device)
    return torch.randn(x.shape, generator=rng).to(x.device)


def _noise(starts: Starts, run: int, threat: ThreatModel) -> Tensor:
    return starts.uniform(run) if threat.norm == "linf" else starts.normal(run)


def _start(x: Tensor, threat: ThreatModel, noise: Tensor) -> Tensor:
    """The point of the ball's surface in the direction of the noise, cut to [0, 1]."""
    length = noise.abs().flatten(1).amax(1) if threat.norm == "linf" else _length(noise)
    return (x + threat.eps * (noise / (per_image(length, x) + _TINY))).clamp(0, 1)


def _move(climb: _Climb, threat: ThreatModel, weight: float) -> Tensor:
    """A projected gradient step, then momentum, projected again."""
    x, z, last = climb.x, climb.z, climb.z - climb.before
    if threat.norm == "linf":
        low, high = (x - threat.eps).clamp(0, 1), (x + threat.eps).clamp(0, 1)
        new = (z + climb.step * climb.grad.sign()).clamp(low, high)
        return (z + (new - z) * weight + last * (1 - weight)).clamp(low, high)
    new = _in_ball(z + climb.step * (climb.grad / (per_image(_length(climb.grad), x) + _TINY)), x, threat.eps)
    return _in_ball(z + (new - z) * weight + last * (1 - weight), x, threat.eps)


def _in_ball(z: Tensor, x: Tensor, eps: float) -> Tensor:
    length = per_image(_length(z - x), x)
    return (x + (z - x) / (length + _TINY) * length.clamp_max(eps)).clamp(0, 1)


def _length(delta: Tensor) -> Tensor:
    return (delta**2).flatten(1).sum(-1).sqrt()
