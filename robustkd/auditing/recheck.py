"""Sanity checks that need nothing but the engine and the ledger (S15, S18). No torch: a board runs them with a kit."""

from __future__ import annotations

import numpy as np

from robustkd.auditing.ledger import Ledger
from robustkd.auditing.probes import Labels, spread
from robustkd.auditing.sides import Judged, Side, read
from robustkd.engines._base import Images
from robustkd.result import Check, CheckStatus
from robustkd.stats import clopper_pearson
from robustkd.threat import SLACK, ThreatModel

#: share of the flags of a random engine that may change beyond its slack
RARE = 0.01


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
        near = np.abs(again.margin) + np.abs(reference.margin) <= max(2e-3 * unit, engine.slack)
        changed, close = changed + int((differ & ~near).sum()), close + int((differ & near).sum())
    total = 2 * len(x)
    if by_chance(changed, total, engine.slack):
        changed, close = 0, close + changed
    status: CheckStatus = "block" if changed else "warn" if close else "ok"
    message = {
        "ok": f"all {total} flags were the same when judged again in another cut",
        "warn": f"{close} of {total} flags changed {'by close votes' if engine.slack else 'within rounding'} when judged again",
        "block": f"{changed} of {total} flags changed when the same images were judged again",
    }[status]
    return Check(name="S18 re-judging", status=status, observed=changed / total, bound=0.0, message=message)


def by_chance(changed: int, total: int, slack: float) -> bool:
    """Whether so few flags of a random engine changed that chance explains it: of many votes a few change a lot."""
    return slack > 0 and clopper_pearson(changed, total)[0] <= RARE
