"""Sanity checks of what the attacks found: the ids S9 to S18 of the protocol. An audit distrusts itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from robustkd.attacks._base import prepared
from robustkd.auditing.ledger import Ledger
from robustkd.auditing.plan import Step
from robustkd.auditing.probes import share
from robustkd.auditing.sides import Side
from robustkd.losses import cross_entropy, margin
from robustkd.result import Check, CheckStatus
from robustkd.stats import mcnemar_exact
from robustkd.threat import ThreatModel

#: images that get a gradient for S12 and S13
GRADIENTS = 256
#: margins to which the logits are scaled down before their loss is compared
SHARP = 10.0
#: robust accuracy on float images beyond that on 8-bit images that warns
GAP = 0.05


def witnesses(ledger: Ledger, steps: list[Step]) -> list[Check]:
    """S9, S10, S11: does anything simpler break images that the attacks with gradients could not?"""
    levels = ("surrogate", "replay", "blackbox", "baseline")
    groups = {level: [s.name for s in steps if s.level == level and s.against != "pool"] for level in levels}
    if not groups["surrogate"]:
        text = "no attack with gradients ran"
        names = ("S9 black box not stronger", "S10 replay not stronger", "S11 noise not stronger")
        return [Check(name=name, status="skipped", message=text) for name in names]
    unbroken = ledger.engine.clean.robust & ~ledger.engine.broken(groups["surrogate"])
    rows = (
        (
            "S9 black box not stronger",
            "blackbox",
            0.002,
            "images were broken by the black-box attack alone; many would mean masked gradients",
        ),
        (
            "S10 replay not stronger",
            "replay",
            0.01,
            "images were broken by a replayed attack alone; many would mean a weak surrogate",
        ),
        ("S11 noise not stronger", "baseline", 0.01, "images were broken by random noise and by no attack with gradients"),
    )
    found = []
    for name, level, bound, text in rows:
        if not groups[level]:
            found.append(Check(name=name, status="skipped", bound=bound, message=f"no {level} attack ran"))
            continue
        only = unbroken & ledger.engine.broken(groups[level])
        scopes = sorted({_scope(ledger, step) for step in steps if step.name in groups[level]}, reverse=True)
        looks = [share(name, int(only[:first].sum()), first, bound, text) for first in scopes]
        found.append(max(looks, key=lambda check: (_GRAVE.index(check.status), check.observed or 0.0)))
    return found


#: states of a check, the gravest last
_GRAVE: tuple[CheckStatus, ...] = ("skipped", "ok", "warn", "block")


def _scope(ledger: Ledger, step: Step) -> int:
    """How many images, from the first, an attack could look at: those beyond its limit are no point for the defender."""
    first = ledger.engine.first(step.images)
    cut = bool((ledger.engine.clean.robust & ~first).any())
    return int(np.flatnonzero(first)[-1]) + 1 if cut else len(first)


def gradients(model: nn.Module, judge: Side, x: Tensor, y: Tensor, threat: ThreatModel, *, logs: bool) -> list[Check]:
    """S12 and S13 on images that are right when clean: gradients exist, and following them raises the engine's loss.

    Args:
        model: what the attacks differentiate.
        judge: the engine itself.
        x: images, right when clean.
        y: their labels.
        threat: its steepest step is taken, of length eps / 4.
        logs: the engine returns probabilities.
    """
    names = ("S12 gradients not zero", "S13 ascent")
    if threat.eps == 0:
        return [Check(name=name, status="skipped", message="eps is 0") for name in names]
    x, y = x[:GRADIENTS], y[:GRADIENTS]
    zero = rising = 0
    for first in range(0, len(x), 64):
        part, labels = x[first : first + 64], y[first : first + 64]
        grad = gradient(model, part, labels)
        size = grad.double().flatten(1).abs().amax(1)
        zero += int((~size.isfinite() | (size < torch.finfo(torch.float32).tiny)).sum())
        moved = threat.project(part + threat.eps / 4 * threat.step(torch.nan_to_num(grad)), part)
        before, after = (losses(judge, z, labels, like=part, logs=logs) for z in (part, moved))
        rising += int((after > before).sum())  # NaN is no rise
    return [
        share(names[0], zero, len(x), 0.01, "images have a zero, denormal or NaN gradient"),
        share(
            names[1],
            rising,
            len(x),
            0.8,
            "images have a higher loss on the engine after one step of eps/4 along the gradient",
            least=True,
        ),
    ]


def eight_bit(ledger: Ledger, steps: list[Step]) -> Check:
    """Robust accuracy on float images and on 8-bit images: an engine that answers float images alone has a trick.

    The other way round tells nothing: an attack whose images are rounded afterwards is naturally the weaker one.
    """
    name = "8-bit images"
    grid, fine = ([s.name for s in steps if s.grid is kind] for kind in (True, False))
    if not grid:
        return Check(name=name, status="skipped", bound=GAP, message="the policy leaves them out")
    clean, n = ledger.engine.clean.robust, len(ledger.worst)
    on_float, on_grid = clean & ~ledger.engine.broken(fine), clean & ~ledger.engine.broken(grid)
    only, other = int((on_float & ~on_grid).sum()), int((on_grid & ~on_float).sum())
    message = f"robust accuracy is {on_float.mean():.1%} on float images and {on_grid.mean():.1%} on 8-bit images"
    gap = (only - other) / n
    status: CheckStatus = "warn" if gap > GAP and mcnemar_exact(only, other) < 0.01 else "ok"
    if status == "warn":
        message += ": the engine treats images that are not 8-bit images in another way"
    return Check(name=name, status=status, observed=gap, bound=GAP, message=message)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross entropy (N, C, H, W) of what the attacks differentiate."""
    with prepared(model), torch.enable_grad():
        z = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(cross_entropy(model(z), y).sum(), z)
    return grad


def losses(judge: Side, x: Tensor, y: Tensor, *, like: Tensor, logs: bool) -> Tensor:
    """Cross entropy (N,) on the engine in float64.

    Above a margin of about 37 cross entropy is exactly zero in float64. So the logits of an image whose clean margin
    exceeds `SHARP` are first divided by what brings it there: whatever is compared gets the same factor.

    Args:
        judge: the engine.
        x: images (N, C, H, W).
        y: labels (N,).
        like: the clean images (N, C, H, W), or (1, C, H, W), whose margins set the factor.
        logs: the engine returns probabilities.
    """
    labels = y.cpu()
    clean = margin(_logits(judge, like, logs=logs), labels[: len(like)])
    return cross_entropy(_logits(judge, x, logs=logs) * (SHARP / clean.clamp_min(SHARP))[:, None], labels)


def _logits(judge: Side, x: Tensor, *, logs: bool) -> Tensor:
    logits = torch.from_numpy(judge.scores.logits(x.cpu().numpy())).double()
    return logits.clamp_min(1e-30).log() if logs else logits
