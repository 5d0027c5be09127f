"""The checks after the attacks, in the order of the protocol: what was found is itself put on trial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from robustkd.auditing import controls, evidence, probes, recheck
from robustkd.auditing.controls import Unseen
from robustkd.auditing.effort import effort
from robustkd.auditing.fresh import Claim, Reopen, judged_afresh
from robustkd.auditing.plan import Step
from robustkd.auditing.sides import NO_NUMBER, Judged, source_side
from robustkd.auditing.steps import Job, pieces
from robustkd.engines._base import Images
from robustkd.recipe.policy import Policy
from robustkd.result import Check


@dataclass(frozen=True)
class Means:
    """What the checks may use besides the audit itself.

    Attributes:
        policy: how hard they try.
        kind: what the engine returns.
        net: the network whose gradients serve, where there is one.
        unseen: images of the data set that the audit does not attack.
        reopen: how another process opens the engine.
    """

    policy: Policy
    kind: probes.Kind
    net: nn.Module | None = None
    unseen: Unseen | None = None
    reopen: Reopen | None = None


def closing_checks(job: Job, steps: list[Step], means: Means) -> list[Check]:
    """S3 and S6 to S18, as far as they look at what the attacks left."""
    ledger = job.ledger
    attacked = sum(int((a.prediction == NO_NUMBER).sum()) for a in ledger.engine.attacks.values())
    found = [probes.finite(ledger.engine.clean, probes.extremes(job.engine, job.x, job.threat), attacked)]
    found += evidence.witnesses(ledger, steps)
    found += _gradients(job, means.kind)
    found += effort(job, means.policy)
    found.append(recheck.inside(ledger, job.threat))
    found.append(controls.memorised(job, means.policy, means.unseen))
    found.append(_control(job, means.net))
    found.append(_again(job, steps, means))
    found.append(evidence.eight_bit(ledger, steps))
    return found


def _gradients(job: Job, kind: probes.Kind) -> list[Check]:
    surrogate = job.models.get("surrogate")
    if not isinstance(surrogate, nn.Module):
        text = "no attack with gradients ran"
        return [Check(name=name, status="skipped", message=text) for name in ("S12 gradients not zero", "S13 ascent")]
    x, y = job.tensors(np.flatnonzero(job.ledger.engine.clean.robust))
    found = evidence.gradients(surrogate, job.engine, x, y, job.threat, logs=kind == "probabilities")
    if kind != "labels":
        return found
    return [found[0], Check(name="S13 ascent", status="skipped", message="labels without scores have no loss to raise")]


def _control(job: Job, net: nn.Module | None) -> Check:
    clean, n = job.ledger.engine.clean, controls.SHUFFLED

    def answer(other: nn.Module, x: Images) -> Judged:
        return source_side(other, job.device, job.batch).judge(x, job.y[: len(x)])

    return controls.another_network(controls.labels_matter(clean, job.y, job.seed), net, answer, clean, job.x[:n])


def _again(job: Job, steps: list[Step], means: Means) -> Check:
    found = recheck.rejudged(job.engine, job.ledger, job.x, job.y, job.batch)
    if means.reopen is None or not means.policy.fresh_process or found.status == "block":
        return found
    channels, height, width = job.x.shape[1:]
    return judged_afresh(
        found, means.reopen, _claims(job, steps), (channels, height, width), job.batch // 2 + 1, stochastic=job.engine.draws > 1
    )


#: in which order a fresh process is asked: what was made on the source owes nothing to the engine's answers
_ORDER = ("replay", "surrogate", "blackbox", "baseline")


def _claims(job: Job, steps: list[Step]) -> Iterator[Claim]:
    """Everything the audit says the engine answered: the attacks first, then their rounded images, the clean ones last.

    An engine that remembers what it was asked would recognise the neighbour of a clean image; here it cannot.
    """
    for _, piece in pieces(job, sorted(steps, key=lambda step: (step.attack is None, _ORDER.index(step.level)))):
        index = piece["index"]
        yield Claim(piece["x_adv"], job.y[index], Judged(piece["engine_prediction"], piece["engine_margin"]))
    yield Claim(job.x, job.y, job.ledger.engine.clean)
