"""memory: peak memory of a training step and of an audit, as functions of batch size and of the number of images.

Each case and each side runs in a process of its own. Counted is the most that process held above where it stood with
networks and images in place (on a GPU: the most that torch had allocated since); a row is in MiB. Three training steps are
taken, as in the middle of a run: the first alone needs less. What a step needs does not depend on how many steps its attack
takes, so two are taken; nor does an audit's on the length of its attacks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.memory import MIB, most, now
from bench.place import HERE, Place
from bench.startup import ROOT
from bench.timing import Row, row

SIDES = ("ours", "reference")
Case = dict[str, Any]
STEPS = 3
"""Training steps on the CPU; on a GPU torch keeps count by itself, and one is enough."""


def rows(*, quick: bool, place: Place = HERE) -> Iterator[Row]:
    """DGAD's step, whose attack goes through student and teacher, and AutoAttack without FAB."""
    for case in cases(quick=quick, device=place.device):
        if place.wants(name_of(case)):
            told = {"device": place.device, "precision": place.precision, "speed": place.speed}
            yield measured({**case, **told})


def cases(*, quick: bool, device: str = "cpu") -> list[Case]:
    """Steps by batch size, audits by number of images and by batch size."""
    batches = ((16, 32) if quick else (16, 32, 64, 128)) if device == "cpu" else (128, 256, 512)
    pairs = [("mnv2", "resnet-18")] if quick else [("mnv2", "resnet-18"), ("rn18", "resnet-18"), ("mnv2", "wrn-34-10")]
    steps = [{"kind": "step", "student": s, "teacher": t, "batch": batch} for s, t in pairs for batch in batches]
    audits = [(64, 64), (256, 64)] if quick else [(64, 64), (256, 64), (1024, 64), (1024, 256)]
    return [*steps, *({"kind": "audit", "n": n, "batch": batch} for n, batch in audits)]


def name_of(case: Case) -> str:
    """Such as `memory/step/dgad/mnv2/resnet-18/b16` or `memory/audit/resnet-18/n256/b64`."""
    if case["kind"] == "step":
        return f"memory/step/dgad/{case['student']}/{case['teacher']}/b{case['batch']}"
    return f"memory/audit/resnet-18/n{case['n']}/b{case['batch']}"


def measured(case: Case) -> Row:
    """The row of a case: both sides in processes of their own."""
    ours, reference = (_process(case, side) / MIB for side in SIDES)
    facts = {key: value for key, value in case.items() if key not in ("threads", "kind")}
    return {**row(name_of(case), [(ours, reference)], unit="MiB"), **facts}


def _process(case: Case, side: str) -> int:
    import torch

    told = json.dumps({**case, "side": side, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "bench.peaks", told]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def peak(case: Case) -> int:
    """Bytes that one side of a case needs in this process."""
    import torch

    torch.set_num_threads(case["threads"])
    with tempfile.TemporaryDirectory() as folder:
        sides: Any = _step(case, Path(folder)) if case["kind"] == "step" else _audit(case)
        run = getattr(sides, case["side"])
        if case["device"] != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            run()
            return int(torch.cuda.max_memory_allocated() - held)
        before = now()
        if case["kind"] == "step" and case["side"] == "ours":
            sides.within()
        for _ in range(STEPS if case["kind"] == "step" else 1):
            run()
        return max(1, most() - before)


def _step(case: Case, folder: Path) -> Any:
    from bench.sizes import paper
    from bench.step import Pair

    size = replace(paper(case["student"], case["teacher"]), batch=case["batch"], steps=2)
    return Pair("dgad", size, folder, place=Place(case["device"], case["precision"], case["speed"]))


def _audit(case: Case) -> Any:
    from bench.audit import Budget, Sides

    budget = Budget("autoattack-short", steps=3, targets=1, queries=10)
    return Sides(budget, case["n"], case["batch"], case["device"])


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    print(json.dumps({"bytes": peak(told)}))
