"""Sanity checks of the engine before any attack: the ids S1 to S7 of the protocol.

Each yields ok, warn or block with what was seen, the bound, and one sentence.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustkd.auditing.sides import NO_NUMBER, Judged, Side, read
from robustkd.engines._base import Images, Logits
from robustkd.errors import NumericsError
from robustkd.result import Check, CheckStatus
from robustkd.stats import clopper_pearson, tango, wilson
from robustkd.threat import ThreatModel

Kind = Literal["logits", "probabilities", "labels"]
Labels = NDArray[np.int64]

#: images that the costlier checks look at
SAMPLE = 128
#: margins below this part of the spread of the logits are rounding, not decisions
ROUNDING = 1e-3
#: distinct outputs, as a part of all outputs, below which they are quantised
COARSE = 0.25
#: agreement of source and engine on clean images below which they are not the same model
PARITY = 0.5


def share(name: str, k: int, n: int, bound: float, message: str, *, least: bool = False) -> Check:
    """Compare the exact interval of k / n with a bound it must not exceed (`least`: not fall below).

    Blocks where the whole interval lies beyond the bound; warns where only the estimate does.
    """
    if n == 0:
        return Check(name=name, status="skipped", bound=bound, message="no image to look at")
    low, high = clopper_pearson(k, n)
    beyond, surely = (k / n < bound, high < bound) if least else (k / n > bound, low > bound)
    status: CheckStatus = "block" if surely else "warn" if beyond else "ok"
    return Check(name=name, status=status, observed=k / n, low=low, high=high, bound=bound, message=f"{k} of {n} {message}")


def spread(logits: Logits) -> float:
    """The typical size of a difference between logits; 1 where it cannot be told."""
    finite = logits[np.isfinite(logits).all(axis=1)]
    found = float(finite.astype(np.float64).std(axis=1).mean()) if len(finite) else 0.0
    return found if found > 0 else 1.0


def flips(a: Judged, b: Judged, unit: float, slack: float = 0.0) -> tuple[int, int]:
    """Images whose top class differs between two answers: beyond rounding (or the slack of a side), and within it."""
    differ = a.prediction != b.prediction
    close = (np.abs(a.margin) <= ROUNDING * unit) & (np.abs(b.margin) <= ROUNDING * unit)
    close |= np.abs(a.margin) + np.abs(b.margin) <= slack
    return int((differ & ~close).sum()), int((differ & close).sum())


def output_kind(logits: Logits) -> Kind:
    """Whether an engine returns logits, probabilities, or only labels in disguise."""
    rows = logits[np.isfinite(logits).all(axis=1)].astype(np.float64)
    if not len(rows):
        return "logits"
    top, rest = rows.max(axis=1), np.sort(rows, axis=1)[:, :-1]
    flat = (rest.max(axis=1) == rest.min(axis=1)) & (top > rest.max(axis=1))
    if rows.shape[1] > 2 and len(np.unique(rows)) <= 2 and flat.any():
        return "labels"
    probabilities = bool((rows >= 0).all() and (rows <= 1).all() and np.allclose(rows.sum(axis=1), 1, atol=1e-3))
    if probabilities and ((top == 1) & (rest.max(axis=1) == 0)).mean() > 0.5:
        return "labels"
    return "probabilities" if probabilities else "logits"


def coarse(logits: Logits) -> bool:
    """Whether outputs are so few values that classes tie and searches stand still, as those of an int8 engine do."""
    rows = logits[np.isfinite(logits).all(axis=1)]
    if rows.shape[0] == 0 or rows.shape[1] < 2:
        return False
    top = np.sort(rows, axis=1)[:, -2:]
    return bool((top[:, 0] == top[:, 1]).any() or len(np.unique(rows)) < COARSE * rows.size)


def deterministic(engine: Side, x: Images, y: Labels, logits: Logits, *, declared: int = 0) -> Check:
    """S1: three identical calls give the same answers; `declared` is the number of draws of an engine declared random."""
    x, y, first = x[:SAMPLE], y[:SAMPLE], logits[:SAMPLE]
    again = [engine.logits(x) for _ in range(2)]
    unit = spread(first)
    flipped = max(flips(read(first, y), read(other, y), unit)[0] for other in again)
    equal = all(np.array_equal(first, other, equal_nan=True) for other in again)
    status: CheckStatus = "block" if flipped else "ok" if equal else "warn"
    message = {
        "ok": "three calls gave the same bits",
        "warn": "three calls gave slightly different numbers and the same classes",
        "block": f"the same {len(x)} images got different classes: use an engine without randomness, "
        "or declare it with --stochastic",
    }[status]
    if declared:
        text = f"declared random: {flipped} of {len(x)} images got different classes in three calls"
        status, message = "warn", f"{text}; it is judged by the majority of {declared} draws"
    return Check(name="S1 deterministic", status=status, observed=flipped / len(x), bound=0.0, message=message)


def batch_independent(engine: Side, x: Images, y: Labels) -> Check:
    """S2: the answer to an image does not depend on the images beside it."""
    x, y = x[:64], y[:64]
    full = engine.logits(x, len(x))
    unit, reference, slack = spread(full), read(full, y), engine.slack
    order = np.random.default_rng(0).permutation(len(x))
    permuted = np.empty_like(full)
    permuted[order] = engine.logits(x[order], len(x))
    cuts = {"1": engine.logits(x, 1), "7": engine.logits(x, 7), "permuted": permuted}
    found = {cut: flips(reference, read(logits, y), unit, slack)[0] for cut, logits in cuts.items()}
    worst = max(found, key=lambda cut: found[cut])
    status: CheckStatus = "block" if found[worst] else "ok"
    message = (
        f"batches of {worst} change the class of {found[worst]} of {len(x)} images"
        if found[worst]
        else f"batches of 1, 7, {len(x)} and another order give the same classes"
    )
    return Check(name="S2 batch independence", status=status, observed=found[worst] / len(x), bound=0.0, message=message)


def extremes(engine: Side, x: Images, threat: ThreatModel) -> int:
    """Grey, black and white images and noise that the engine answers with NaN or Inf."""
    shape = x.shape[1:]
    noise = np.random.default_rng(0).uniform(-threat.eps, threat.eps, x[:SAMPLE].shape)
    noisy = np.clip(x[:SAMPLE] + noise, 0, 1).astype(np.float32)
    probes = np.concatenate([np.full((1, *shape), v, np.float32) for v in (0.5, 0.0, 1.0)] + [noisy])
    return int((~np.isfinite(engine.logits(probes)).all(axis=1)).sum())


def finite(clean: Judged, odd: int, attacked: int) -> Check:
    """S3: every answer is a number; `odd` and `attacked` count other answers to probes and to adversarial images."""
    found = int((clean.prediction == NO_NUMBER).sum()) + odd + attacked
    message = (
        f"{found} answers held NaN or Inf; such images count as broken"
        if found
        else "clean, noisy, grey, black, white and adversarial images all got finite logits"
    )
    return Check(name="S3 finite logits", status="block" if found else "ok", observed=float(found), bound=0.0, message=message)


def output(logits: Logits, clean: Judged, kind: Kind, *, decisions: bool = False) -> Check:
    """S4: what the outputs are, and how often two classes tie for the first place.

    Labels without scores block, unless an attack runs that reads `decisions` alone.
    """
    top = np.sort(logits, axis=1)[:, -2:]
    ties = int((top[:, 0] == top[:, 1]).sum())
    values = len(np.unique(logits[np.isfinite(logits)]))
    seen = f"{values} distinct values, {ties} of {len(logits)} clean images tie for the first place"
    status: CheckStatus = {"logits": "ok", "probabilities": "warn", "labels": "block"}[kind]  # type: ignore[assignment]
    message = {
        "logits": f"the engine returns logits; {seen}",
        "probabilities": f"the engine returns probabilities; attacks use their logarithm; {seen}",
        "labels": f"the engine returns labels without scores, which these attacks cannot judge; {seen}",
    }[kind]
    if kind == "labels" and decisions:
        status = "warn"
        message = f"the engine returns labels without scores; an attack that reads decisions alone runs; {seen}"
    if kind == "logits" and ties > 0.1 * len(logits):
        status = "warn"
    return Check(name="S4 output kind", status=status, observed=ties / max(1, len(logits)), message=message)


def agreement(engine: Judged, other: Judged, tolerance: float, *, paired: bool) -> Check:
    """S5: engine and source (or twin) agree on clean images, and clean accuracy does not drop beyond tolerance.

    Raises:
        NumericsError: they are so far apart that the engine is not this model.
    """
    n = len(engine.prediction)
    same = int((engine.prediction == other.prediction).sum())
    low, high = wilson(same, n)
    if high < PARITY and (engine.prediction != NO_NUMBER).all():
        raise NumericsError(
            f"parity is broken: engine and source agree on {same} of {n} clean images",
            where="S5 clean agreement",
            fix="give the checkpoint this engine was made from, check channel order, range and normalisation; "
            "or audit without a source: --source none",
        )
    b = int((other.robust & ~engine.robust).sum())
    c = int((engine.robust & ~other.robust).sum())
    dropped = paired and tango(b, c, n)[0] > tolerance
    status: CheckStatus = "block" if dropped else "warn" if same / n < 0.9 else "ok"
    who = "source" if paired else "twin"
    message = f"engine and {who} give the same class on {same} of {n} clean images"
    if dropped:
        message += f"; clean accuracy drops by {100 * (b - c) / n:.1f} points"
    return Check(name="S5 clean agreement", status=status, observed=same / n, low=low, high=high, bound=0.9, message=message)


def grey(engine: Side, x: Images, y: Labels) -> Check:
    """S7: mid-grey is one image, so a deterministic classifier is right on it for one class at most."""
    right = int(engine.judge(np.full_like(x, 0.5), y).robust.sum())
    bound = int(np.bincount(y).max())
    over = clopper_pearson(right, len(y))[0] > bound / len(y) if engine.slack else right > bound
    status: CheckStatus = "block" if over else "ok"
    message = f"right on mid-grey for {right} of {len(y)} labels; the largest class has {bound}"
    return Check(name="S7 mid-grey", status=status, observed=right / len(y), bound=bound / len(y), message=message)


def eps_unit(threat: ThreatModel) -> Check | None:
    """A radius above half the range of a pixel is most likely eps given as 8 instead of 8/255."""
    if threat.norm != "linf" or threat.eps <= 0.5:
        return None
    message = f"eps is {threat.eps:g}, more than half the range of a pixel: did you mean {threat.eps:g}/255?"
    return Check(name="eps unit", status="warn", observed=threat.eps, bound=0.5, message=message)
