"""Controls of the evidence: S16 (memorised test images) and S17 (shuffled labels, another network).

A model that has memorised its test set is as robust on it as one likes, and no attack inside the ball can tell. It
gives itself away on copies it has not stored: mirrored ones, and images that were never shown in this audit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustkd.auditing.effort import LADDER_STEPS, afresh, sample
from robustkd.auditing.probes import Labels
from robustkd.auditing.sides import Judged
from robustkd.auditing.steps import Job
from robustkd.catalog import Shelf
from robustkd.engines._base import Images
from robustkd.recipe.policy import Policy
from robustkd.result import Check, CheckStatus
from robustkd.stats import clopper_pearson

#: drops of accuracy on other copies: what warns, and what blocks
WARN, BLOCK = 0.05, 0.20
#: share of the images right when mirrored from which on mirroring seems to keep the label
KEEPS = 0.8
#: images of the control with shuffled weights, and the right answers below which it tells nothing
SHUFFLED, TOO_FEW = 64, 20


class Unseen(NamedTuple):
    """Images of the data set that the audit does not attack."""

    x: Images
    y: Labels


class Drop(NamedTuple):
    """How much less is right on other copies than on the audited images, and whether that is more than chance."""

    what: str
    points: float
    sure: bool


def memorised(job: Job, policy: Policy, unseen: Unseen | None) -> Check:
    """S16: right and robust on mirrored copies and on unseen images about as often as on the audited ones.

    Mirroring changes the label of digits and signs. So with a source its drop counts beyond the source's own; without
    one it blocks only where no unseen image can clear the engine.
    """
    name = "S16 memorisation"
    if not job.ledger.engine.clean.robust.any():
        return Check(name=name, status="skipped", bound=BLOCK, message="no image is right when clean")
    mirrored, fresh = _mirrored(job, policy), _fresh(job, policy, unseen) if unseen is not None else []
    cleared = bool(fresh) and all(_status(drop) == "ok" for drop in fresh)
    judged = [(drop, _status(drop)) for drop in fresh]
    judged += [(drop, _status(drop, doubted=cleared and job.source is None)) for drop in mirrored]
    order: tuple[CheckStatus, ...] = ("ok", "warn", "block")
    worst, status = max(judged, key=lambda entry: (order.index(entry[1]), entry[0].points))
    told = "; ".join(f"{100 * drop.points:+.1f} points {drop.what}" for drop, _ in judged)
    message = f"accuracy lost on other copies: {told}"
    if status == "block":
        message += ": the audited images look memorised"
        if not fresh:
            message += ", or left and right matter in them; audit fewer than there are, so that the others can clear it"
    elif not fresh:
        message += "; there are no unseen images to compare with"
    return Check(name=name, status=status, observed=worst.points, bound=BLOCK, message=message)


def _status(drop: Drop, *, doubted: bool = False) -> CheckStatus:
    if drop.points > BLOCK and drop.sure and not doubted:
        return "block"
    return "warn" if drop.points > WARN and drop.sure else "ok"


def _mirrored(job: Job, policy: Policy) -> list[Drop]:
    """Left and right exchanged: clean accuracy (beyond the source's own loss), and accuracy under attack."""
    flipped = np.ascontiguousarray(job.x[..., ::-1])
    before, after = job.ledger.engine.clean.robust, job.engine.judge(flipped, job.y).robust
    n, lost = len(job.y), int(before.sum()) - int(after.sum())
    if job.source is not None and job.ledger.source is not None:
        lost -= int(job.ledger.source.clean.robust.sum()) - int(job.source.judge(flipped, job.y).robust.sum())
    changed = int((before != after).sum())
    # a sign test of the discordant images: lost of them more went one way than the other
    drops = [Drop("mirrored", lost / n, lost > 2.6 * math.sqrt(max(1, changed)))]
    index = sample(job, policy.memory_images)
    usable = index[after[index]]
    if _attacks(job) and len(usable) >= max(1, KEEPS * len(index)):
        seen = _under_attack(job, "memory-mirrored-seen", job.x[usable], job.y[usable])
        other = _under_attack(job, "memory-mirrored", flipped[usable], job.y[usable])
        drops.append(_drop("mirrored and under attack", int(seen.sum()), len(seen), int(other.sum()), len(other)))
    return drops


def _fresh(job: Job, policy: Policy, unseen: Unseen) -> list[Drop]:
    """Images that this audit has not shown: clean accuracy, and accuracy under attack."""
    right, clean = job.engine.judge(unseen.x, unseen.y).robust, job.ledger.engine.clean.robust
    drops = [_drop("on unseen images", int(clean.sum()), len(clean), int(right.sum()), len(right))]
    index, usable = sample(job, policy.memory_images), np.flatnonzero(right)[: policy.memory_images]
    if _attacks(job) and len(index) and len(usable):
        seen = _under_attack(job, "memory-seen", job.x[index], job.y[index])
        other = _under_attack(job, "memory-unseen", unseen.x[usable], unseen.y[usable])
        drops.append(_drop("on unseen images under attack", int(seen.sum()), len(seen), int(other.sum()), len(other)))
    return drops


def _attacks(job: Job) -> bool:
    return isinstance(job.models.get("surrogate"), nn.Module) and job.threat.eps > 0


def _under_attack(job: Job, name: str, x: Images, y: Labels) -> NDArray[np.bool_]:
    attack = Shelf("attacks").get("pgd")(steps=LADDER_STEPS)
    images, labels = torch.from_numpy(x).to(job.device), torch.from_numpy(y).to(job.device)
    return afresh(job, name, attack, images, labels, job.threat, stream="memory").robust


def _drop(what: str, before: int, n: int, after: int, m: int) -> Drop:
    """Two shares, from different images: sure where their exact 99 % intervals do not touch."""
    a, b = before / n, after / m
    return Drop(what, a - b, clopper_pearson(before, n, 0.01)[0] > clopper_pearson(after, m, 0.01)[1])


def labels_matter(clean: Judged, y: Labels, seed: int) -> Check:
    """S17, first half: shuffled labels are met by chance only, as often as the two class counts say."""
    name, n, classes = "S17 label control", len(y), int(max(y.max(), clean.prediction.max())) + 1
    shuffled = np.random.default_rng(seed).permutation(y)
    k = int((clean.prediction == shuffled).sum())
    answers = np.bincount(np.maximum(clean.prediction, 0), clean.prediction >= 0, classes)
    chance = float((answers * np.bincount(y, minlength=classes)).sum()) / n**2
    low, high = clopper_pearson(k, n, 0.001)
    status: CheckStatus = "block" if low > chance else "ok"
    message = f"shuffled labels are met on {k} of {n} images, chance is {chance * n:.1f}"
    if status == "block":
        message += ": the labels reach the engine, or the order of the images does"
    return Check(name=name, status=status, observed=k / n, low=low, high=high, bound=chance, message=message)


def another_network(
    check: Check, net: nn.Module | None, answer: Callable[[nn.Module, Images], Judged], clean: Judged, x: Images
) -> Check:
    """S17, second half: the same network with shuffled weights gets other flags, so it is this network that is judged.

    Args:
        check: the first half.
        net: the network whose gradients serve.
        answer: judges the first images of the audit by a network.
        clean: the engine's clean answers.
        x: the audited images.
    """
    n = min(SHUFFLED, len(x))
    if net is None or check.status == "block" or clean.robust[:n].sum() < TOO_FEW:
        return check
    if next(net.parameters(), None) is None:  # a rebuilt graph of plain arithmetic has nothing to shuffle
        return check
    other = answer(_Shuffled(net), x[:n])
    differ = int((other.robust != clean.robust[:n]).sum())
    text = f"{check.message}; a network of shuffled weights gets other flags on {differ} of {n}"
    if differ:
        return check.model_copy(update={"message": text})
    return check.model_copy(update={"status": "block", "message": f"{text}: what is judged does not depend on its weights"})


class _Shuffled(nn.Module):
    """A network whose parameters are permuted within each tensor and turned round."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self._net = [net]  # in a list, so that it is no part of this module
        self._weights = {
            name: -p.detach().flatten()[torch.randperm(p.numel(), generator=rng).to(p.device)].view_as(p)
            for name, p in net.named_parameters()
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        logits: torch.Tensor = torch.func.functional_call(self._net[0], self._weights, (x,))
        return logits
