"""S18 in a fresh process: the engine is opened anew and answers every image of the audit, the adversarial ones first.

An engine that counts its queries, remembers what it was asked, or was warmed up differently answers otherwise there.
The child is `python -m robustkd.auditing.fresh FOLDER`; it imports no torch unless the engine does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustkd.auditing.probes import Labels, spread
from robustkd.auditing.recheck import by_chance
from robustkd.auditing.sides import Judged, read
from robustkd.auditing.stochastic import SLACK, side_of_engine
from robustkd.engines._base import Engine, Images, Logits
from robustkd.errors import NumericsError
from robustkd.result import Check
from robustkd.signals import check

Shape = tuple[int, int, int]


class Reopen(NamedTuple):
    """How another process opens the engine: `module:function`, called with one text and the shape of the images."""

    entry: str
    argument: str


class Claim(NamedTuple):
    """Images, their labels, and what the audit says the engine answered."""

    x: Images
    y: Labels
    judged: Judged


def open_file(path: str, shape: Shape) -> Engine:
    """The engine of an exported file."""
    from robustkd.engines._open import open_engine

    return open_engine(Path(path))


def answers(reopen: Reopen, pools: Iterable[Images], shape: Shape, batch: int, *, stochastic: bool = False) -> list[Logits]:
    """The logits that a fresh process gets for each pool of images, asked in this order and in batches of `batch`.

    Those of an engine declared random are the shares of its votes.

    Raises:
        NumericsError: the process ended without an answer.
        Interrupted: a signal asked for a stop.
    """
    with tempfile.TemporaryDirectory(prefix="robustkd-") as name:
        folder, count = Path(name), 0
        for count, pool in enumerate(pools, 1):
            np.save(folder / f"pool-{count - 1}.npy", pool)
        request = {**reopen._asdict(), "shape": shape, "batch": batch, "pools": count, "stochastic": stochastic}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        root = str(Path(__file__).resolve().parents[2])  # of a checkout that is not installed
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        command = [sys.executable, "-m", "robustkd.auditing.fresh", name]
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        check()
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise NumericsError(
                f"the engine did not answer in a fresh process: {last[:200]}", fix="see whether the file runs alone"
            )
        return [np.load(folder / f"logits-{number}.npy") for number in range(count)]


def main(folder: Path) -> None:
    """The child: open the engine, answer every pool, leave the logits beside it."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    module, _, function = request["entry"].partition(":")
    with getattr(import_module(module), function)(request["argument"], tuple(request["shape"])) as engine:
        side = side_of_engine(engine, request["batch"], stochastic=request["stochastic"])
        for number in range(request["pools"]):
            np.save(folder / f"logits-{number}.npy", side.logits(np.load(folder / f"pool-{number}.npy")))


def judged_afresh(
    found: Check, reopen: Reopen, claims: Iterable[Claim], shape: Shape, batch: int, *, stochastic: bool = False
) -> Check:
    """The check S18, which holds only if a fresh process also gives every flag of the claims.

    Args:
        found: what judging again in this process gave.
        reopen: how the other process opens the engine.
        claims: pools of images with labels and what was answered, in the order in which they are asked.
        shape: (C, H, W).
        batch: images at a time, another number than in the audit.
        stochastic: the engine is declared random; flags of close votes may change.
    """
    before: list[Claim] = []

    def pools() -> Iterator[Images]:
        for claim in claims:
            before.append(claim._replace(x=claim.x[:0]))
            yield claim.x

    try:
        logits = answers(reopen, pools(), shape, batch, stochastic=stochastic)
    except NumericsError as error:
        return found.model_copy(update={"status": "block", "message": error.what})
    changed = close = total = 0
    for claim, rows in zip(before, logits, strict=True):
        again, unit = read(rows, claim.y), spread(rows)
        differ = again.robust != claim.judged.robust
        near = np.abs(again.margin) + np.abs(claim.judged.margin) <= (SLACK if stochastic else 2e-3 * unit)
        total, changed = total + len(rows), changed + int((differ & ~near).sum())
        close += int((differ & near).sum())
    if by_chance(changed, total, SLACK if stochastic else 0.0):
        changed, close = 0, close + changed
    if changed:
        text = f"{changed} of {total} flags changed when a fresh process judged the same images"
        return found.model_copy(update={"status": "block", "observed": changed / total, "message": text})
    if found.status != "ok":
        return found
    if close:
        why = "by close votes" if stochastic else "within rounding"
        text = f"{close} of {total} flags changed {why} when a fresh process judged the same images"
        return found.model_copy(update={"status": "warn", "observed": close / total, "message": text})
    return found.model_copy(update={"message": f"{found.message}, and all {total} in a fresh process"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
