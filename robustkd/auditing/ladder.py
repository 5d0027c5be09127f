"""How far each image stands: a ladder of radii on which no image rises again once it fell.

The runs of S6 are independent of each other, so that a rise among them shows masked gradients. Here they are put
together: an adversarial image lies in every larger ball too, so its original counts as broken there. From the smallest
radius at which S6 or the audit itself broke an image, the search goes down rung by rung: what broke the image is
projected into the next smaller ball and attacked further from there, until a ball holds. No part in the verdict.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robustkd.attacks.pgd import PGD
from robustkd.auditing.effort import LADDER_STEPS, RUNGS, obstacle, on_rungs, sample
from robustkd.auditing.steps import Job
from robustkd.engines._base import Images
from robustkd.recipe.policy import Policy
from robustkd.result import RadiusCurve
from robustkd.threat import ThreatModel

Rungs = NDArray[np.int64]
NAME = "check-radius"


class Fallen(NamedTuple):
    """For each image of the sample the smallest rung at which it fell, `len(RUNGS)` where it stood, and its image there."""

    rung: Rungs
    x_adv: Images


def radius_curve(job: Job, policy: Policy) -> RadiusCurve | None:
    """The smallest radius of the ladder at which each image of S6 fell; None where S6 did not run."""
    if obstacle(job, policy.ladder_images):
        return None
    index = sample(job, policy.ladder_images)
    rung = fallen(job, index).rung
    eps = [part * job.threat.eps for part in RUNGS]
    return RadiusCurve(
        attack=f"pgd-{LADDER_STEPS}, warm-started",
        images=tuple(index.tolist()),
        eps=(0.0, *eps),
        survive=(1.0, *(float((rung > k).mean()) for k in range(len(RUNGS)))),
        radius=tuple(eps[k] if k < len(RUNGS) else None for k in rung.tolist()),
    )


def fallen(job: Job, index: NDArray[np.int64]) -> Fallen:
    """The ladder of these images, kept so that a resumed audit does not climb it again."""
    piece: dict[str, NDArray[Any]] | None = job.store.get(NAME)
    if piece is None:
        found = _descend(job, index, _known(job, index))
        piece = {"rung": found.rung, "x_adv": found.x_adv}
        job.store.put(NAME, piece)
    return Fallen(piece["rung"], piece["x_adv"])


def _known(job: Job, index: NDArray[np.int64]) -> Fallen:
    """What S6 and the audit have found already; where nothing broke an image, S6's attempt in the largest ball."""
    runs, k_audit = list(on_rungs(job, index).values()), RUNGS.index(1.0)
    rung, x_adv = np.full(len(index), len(RUNGS)), runs[-1].x_adv.copy()
    found = [(k, ~run.robust, run.x_adv) for k, run in enumerate(runs)]
    for k, broken, images in [*found, (k_audit, job.ledger.worst_margin[index] <= 0, job.ledger.worst[index])]:
        lower = broken & (k < rung)
        rung[lower], x_adv[lower] = k, images[lower]
    return Fallen(rung, x_adv)


def _descend(job: Job, index: NDArray[np.int64], known: Fallen) -> Fallen:
    """Attack from the rung above, down to the first rung that holds."""
    rung, x_adv, open_ = known.rung.copy(), known.x_adv.copy(), np.ones(len(index), np.bool_)
    attack, model = PGD(steps=LADDER_STEPS), job.models["surrogate"]
    for k in reversed(range(len(RUNGS))):
        rows = np.flatnonzero(open_ & (rung > k))
        threat = ThreatModel(norm=job.threat.norm, eps=RUNGS[k] * job.threat.eps)
        for first in range(0, len(rows), job.batch):
            part = rows[first : first + job.batch]
            x, y = job.tensors(index[part])
            start = torch.from_numpy(x_adv[part]).to(job.device)
            found = attack.onward(model, x, y, threat, start).x_adv.cpu().numpy()
            broken = ~job.engine.judge(found, job.y[index[part]]).robust
            rung[part[broken]], x_adv[part[broken]] = k, found[broken]
            open_[part[~broken]] = False
    return Fallen(rung, x_adv)
