"""Sanity checks of what the attacks found: the ids S9 to S18 of the protocol. An audit distrusts itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from robustkd.attacks._base import prepared
from robustkd.attacks._guard import SLACK
from robustkd.auditing.ledger import Ledger
from robustkd.auditing.plan import Step
from robustkd.auditing.probes import Labels, share, spread
from robustkd.auditing.sides import Judged, Side, read
from robustkd.engines._base import Images
from robustkd.losses import cross_entropy
from robustkd.result import Check, CheckStatus
from robustkd.threat import ThreatModel

#: images that get a gradient for S12 and S13
GRADIENTS = 256


def witnesses(ledger: Ledger, steps: list[Step]) -> list[Check]:
    """S9, S10, S11: does anything simpler break images that the attacks with gradients could not?"""
    groups = {level: [s.name for s in steps if s.level == level] for level in ("surrogate", "replay", "blackbox", "baseline")}
    n = len(ledger.worst)
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
        only = int((unbroken & ledger.engine.broken(groups[level])).sum())
        found.append(share(name, only, n, bound, text))
    return found


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
        grad = _gradient(model, part, labels)
        size = grad.double().flatten(1).abs().amax(1)
        zero += int((~size.isfinite() | (size < torch.finfo(torch.float32).tiny)).sum())
        moved = threat.project(part + threat.eps / 4 * threat.step(torch.nan_to_num(grad)), part)
        rising += int((_loss(judge, moved, labels, logs=logs) > _loss(judge, part, labels, logs=logs)).sum())
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


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with prepared(model), torch.enable_grad():
        z = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(cross_entropy(model(z), y).sum(), z)
    return grad


def _loss(judge: Side, x: Tensor, y: Tensor, *, logs: bool) -> Tensor:
    """Cross entropy on the engine in float64, where a factor on the logits does not flatten it; NaN is no rise."""
    logits = torch.from_numpy(judge.logits(x.cpu().numpy())).double()
    if logs:
        logits = logits.clamp_min(1e-30).log()
    return cross_entropy(logits, y.cpu())


def inside(ledger: Ledger, threat: ThreatModel) -> Check:
    """S15: every adversarial image lies in the ball and in [0, 1]."""
    message = (
        f"{ledger.outside} adversarial images lie outside the ball or outside [0, 1]"
        if ledger.outside
        else f"the furthest adversarial image is {ledger.furthest:.6f} away, eps is {threat.eps:.6f}"
    )
    status: CheckStatus = "block" if ledger.outside else "ok"
    name = "S15 in ball and range"
    return Check(name=name, status=status, observed=ledger.furthest, bound=threat.eps + SLACK, message=message)


def rejudged(engine: Side, ledger: Ledger, x: Images, y: Labels, batch_size: int) -> Check:
    """S18: judging all final images again, in reverse and in another cut, gives the same flags."""
    other = batch_size // 2 + 1
    unit = spread(engine.logits(x[:64]))
    changed = close = 0
    for images, before in ((x, ledger.engine.clean), (ledger.worst, None)):
        again = read(engine.logits(images[::-1], other)[::-1], y)
        reference = before if before is not None else Judged(again.prediction, ledger.worst_margin)
        differ = again.robust != reference.robust
        near = np.abs(again.margin) + np.abs(reference.margin) <= 2e-3 * unit
        changed, close = changed + int((differ & ~near).sum()), close + int((differ & near).sum())
    total = 2 * len(x)
    status: CheckStatus = "block" if changed else "warn" if close else "ok"
    message = {
        "ok": f"all {total} flags were the same when judged again in another cut",
        "warn": f"{close} of {total} flags changed within rounding when judged again",
        "block": f"{changed} of {total} flags changed when the same images were judged again",
    }[status]
    return Check(name="S18 re-judging", status=status, observed=changed / total, bound=0.0, message=message)
