"""Sanity checks that attack again, on a bounded sample: S6 (eps ladder), S8 (more effort) and S14 (logit scale).

Carlini et al., "On Evaluating Adversarial Robustness", 2019: accuracy must not rise with the radius, and an attack
that is given more steps or restarts must not become weaker. Every run is independent of the others and of the audit.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkd.attacks._base import Attack, Model
from robustkd.auditing.ledger import Flags
from robustkd.auditing.plan import seed_of
from robustkd.auditing.probes import share
from robustkd.auditing.steps import Job
from robustkd.auditing.twin import Surrogate, Tamed, spread, tame
from robustkd.catalog import Shelf
from robustkd.engines._base import Images
from robustkd.recipe.policy import Policy
from robustkd.result import Check, CheckStatus, EpsCurve
from robustkd.stats import clopper_pearson, mcnemar_exact
from robustkd.threat import ThreatModel

#: parts of eps that the ladder climbs; eps = 0 is the clean answer
RUNGS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: steps of the ladder's PGD, and of the one that compares scales
LADDER_STEPS, SCALE_STEPS = 20, 10
#: a rise under a stronger attack that chance explains less often than this is a contradiction
CHANCE = 0.01
#: a margin beyond which the gradient of a float32 cross entropy is exactly zero
SATURATED = 100.0
#: a spread of logits below which a plain loss hardly moves
FAINT = 1e-4
#: images that set the scale of the logits
SCALE = 256


def effort(job: Job, policy: Policy) -> list[Check]:
    """S6, S8 and S14, each on as many images as the policy gives it."""
    found = []
    for name, n, check in (
        ("S6 eps ladder", policy.ladder_images, ladder),
        ("S8 more effort", policy.effort_images, more_effort),
        ("S14 logit scale", policy.scale_images, logit_scale),
    ):
        if why := obstacle(job, n):
            found.append(Check(name=name, status="skipped", message=why))
        else:
            found.append(check(job, sample(job, n), policy))
    return found


def obstacle(job: Job, n: int) -> str:
    """Why a check that attacks n images cannot run; empty where it can."""
    if not n:
        return "the policy leaves it out"
    if not isinstance(job.models.get("surrogate"), nn.Module):
        return "no attack with gradients can run"
    if job.threat.eps == 0:
        return "eps is 0"
    return "" if len(sample(job, n)) else "no image is right when clean"


def sample(job: Job, n: int) -> NDArray[np.int64]:
    """The first n images that are right when clean."""
    return np.flatnonzero(job.ledger.engine.clean.robust)[:n]


class Run(NamedTuple):
    """Who survived an attack made for a check, and the images it left; none of these where they are not kept."""

    robust: Flags
    x_adv: Images


def afresh(
    job: Job,
    name: str,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    model: Model | None = None,
    stream: str = "",
    images: bool = False,
) -> Run:
    """Attack a sample afresh: which of its images the engine still answers by a strictly positive margin.

    The flags, and the images where they are asked for, are kept under `name`, so a resumed audit does not compute them
    again. The randomness is that of `stream`, or of the name.
    """
    piece = job.store.get(f"check-{name}")
    if piece is None:
        flags, left = [np.zeros(0, np.bool_)], [job.x[:0]]
        for chunk, first in enumerate(range(0, len(x), job.batch)):
            part, labels = x[first : first + job.batch], y[first : first + job.batch]
            seed = seed_of(job.seed, f"check-{stream or name}", 0 if attack.per_image else chunk)
            left.append(attack.perturb(model or job.models["surrogate"], part, labels, threat, seed=seed).x_adv.cpu().numpy())
            flags.append(job.engine.judge(left[-1], labels.cpu().numpy()).robust)
        piece = dict[str, NDArray[Any]](flags=np.concatenate(flags))
        if images:
            piece["x_adv"] = np.concatenate(left)
        job.store.put(f"check-{name}", piece)
    return Run(piece["flags"], piece.get("x_adv", job.x[:0]))


def ladder(job: Job, index: NDArray[np.int64], policy: Policy) -> Check:
    """S6: robust accuracy does not rise with eps, over independent runs of PGD."""
    rungs = {"0": np.ones(len(index), np.bool_)} | {f"{part:g} eps": run.robust for part, run in on_rungs(job, index).items()}
    shown = ", ".join(f"{100 * flags.mean():.0f}" for flags in rungs.values())
    return _no_rise(
        "S6 eps ladder", rungs, f"{shown} % of {len(index)} images survive PGD-{LADDER_STEPS} at {', '.join(rungs)}"
    )


def on_rungs(job: Job, index: NDArray[np.int64]) -> dict[float, Run]:
    """Who survives PGD at each part of eps, with the images; runs that were done are not done again."""
    x, y = job.tensors(index)
    attack = Shelf("attacks").get("pgd")(steps=LADDER_STEPS)
    threats = {part: ThreatModel(norm=job.threat.norm, eps=part * job.threat.eps) for part in RUNGS}
    return {part: afresh(job, f"ladder-{part:g}", attack, x, y, threat, images=True) for part, threat in threats.items()}


def eps_curve(job: Job, policy: Policy) -> EpsCurve | None:
    """What S6 saw, as figures; None where it did not run."""
    if obstacle(job, policy.ladder_images):
        return None
    index = sample(job, policy.ladder_images)
    left = {0.0: 1.0} | {part * job.threat.eps: float(run.robust.mean()) for part, run in on_rungs(job, index).items()}
    return EpsCurve(attack=f"pgd-{LADDER_STEPS}", images=len(index), eps=tuple(left), survive=tuple(left.values()))


def more_effort(job: Job, index: NDArray[np.int64], policy: Policy) -> Check:
    """S8: more steps and restarts are not weaker, and break next to nothing that the audit's attacks left."""
    x, y = job.tensors(index)
    steps, name = policy.effort_steps, "S8 more effort"
    plans = {"few": (max(1, steps // 5), 1), "usual": (steps, 1), "many": (5 * steps, 1), "restarts": (steps, 5)}
    runs = {
        label: afresh(job, f"effort-{label}", Shelf("attacks").get("apgd-ce")(steps=n, restarts=k), x, y, job.threat).robust
        for label, (n, k) in plans.items()
    }
    shown = ", ".join(f"{100 * runs[label].mean():.0f}" for label in plans)
    budgets = f"{plans['few'][0]}, {steps} and {5 * steps} steps of APGD-CE and {steps} with 5 restarts"
    rise = _no_rise(name, {k: runs[k] for k in ("few", "usual", "many")}, f"{shown} % of {len(x)} images survive {budgets}")
    if rise.status == "block":
        return rise
    new = int((job.ledger.engine.robust()[index] & ~(runs["many"] & runs["restarts"])).sum())
    low, high = clopper_pearson(new, len(x))
    status: CheckStatus = "block" if low > 0.03 else "warn" if new / len(x) > 0.01 else rise.status
    message = f"{rise.message}; {new} of them fall that the audit's own attacks left"
    if new / len(x) > 0.01:
        message += ": those had not converged, take a stronger policy"
    return Check(name=name, status=status, observed=new / len(x), low=low, high=high, bound=0.01, message=message)


def _no_rise(name: str, runs: dict[str, Flags], seen: str) -> Check:
    """Whether any run survives better than a weaker one: blocks where that is no chance, warns where it may be."""
    n = len(next(iter(runs.values())))
    worst, p = 0, 1.0
    for weak, strong in combinations(runs.values(), 2):
        gained, lost = int((strong & ~weak).sum()), int((weak & ~strong).sum())
        if gained - lost > worst:
            worst, p = gained - lost, mcnemar_exact(gained, lost)
    rise = worst / n
    status: CheckStatus = "block" if rise > 0.02 and p < CHANCE else "warn" if rise > 0.02 and p < 0.1 else "ok"
    text = (
        seen
        if status == "ok"
        else f"{seen}: a stronger attack leaves {worst} more (McNemar p = {p:.2g}), which points to masked gradients"
    )
    return Check(name=name, status=status, observed=rise, bound=0.02, message=text)


def logit_scale(job: Job, index: NDArray[np.int64], policy: Policy) -> Check:
    """S14: with all logits ten times as large the flags are the same; the logits themselves saturate no loss."""
    name, surrogate = "S14 logit scale", job.models["surrogate"]
    if not isinstance(surrogate, Surrogate):
        return Check(name=name, status="skipped", message="the engine's outputs have no scale: they are labels")
    x, y = job.tensors(index)
    clean = torch.from_numpy(job.x[:SCALE]).to(job.device)
    larger = tame(Tamed(surrogate.values, 10.0), surrogate.twin, clean)
    attack = Shelf("attacks").get("pgd")(steps=SCALE_STEPS)
    flags = [
        afresh(job, f"scale-{factor}", attack, x, y, job.threat, model=model, stream="scale").robust
        for factor, model in ((1, surrogate), (10, larger))
    ]
    changed = int((flags[0] != flags[1]).sum())
    if job.engine.slack:  # votes change by chance, in both directions alike
        gained, lost = int((flags[1] & ~flags[0]).sum()), int((flags[0] & ~flags[1]).sum())
        changed = abs(gained - lost) if mcnemar_exact(gained, lost) < CHANCE else 0
    found = share(name, changed, len(x), 0.02, "images get another flag when all logits are ten times as large")
    return (
        found
        if found.status != "ok"
        else _odd_scale(found, spread(surrogate.values, clean), job.ledger.engine.clean.margin[index])
    )


def _odd_scale(check: Check, size: float, margins: NDArray[np.float64]) -> Check:
    """The check, or a warning where an attack that takes the logits as they are would be blind."""
    wide = int((margins > SATURATED).sum())
    if 0 < size < FAINT:
        text = f"the logits of an image differ by {size:.1e} only, where a plain loss hardly moves; attacks use them scaled up"
    elif wide > 0.1 * len(margins):
        text = f"{wide} of {len(margins)} margins exceed {SATURATED:g}, where a plain cross entropy has no gradient"
        text += "; attacks use them scaled down"
    else:
        return check
    return check.model_copy(update={"status": "warn", "message": text})
