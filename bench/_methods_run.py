"""One run of bench.methods in a process of its own: train or resume, measure, write measured.json.

    python -m bench._methods_run OUTPUT NAME

NAME is `LABEL-sSEED`, `teacher-clean` or `teacher-robust`; OUTPUT/setting.json holds the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench._methods_plan import CARD, CLEAN_TEACHER, ROBUST_TEACHER, Row, Setting, choose, clean_recipe, recipe_for
from robustkd import signals
from robustkd.bundle import Bundle, hardware, versions, write_json
from robustkd.catalog import Shelf
from robustkd.errors import Interrupted, RobustKDError
from robustkd.methods._cost import cost_of
from robustkd.models._files import load_net
from robustkd.recipe.schema import Recipe, TeacherConfig
from robustkd.threat import ThreatModel
from robustkd.training.teachers import load_teachers
from robustkd.training.verb import WORK, difference, distill

BATCH = 250
MEASURED, FAILED = "measured.json", "failed.json"
INTERRUPTED = 130
Flags = NDArray[np.bool_]


def main(output: Path, name: str) -> int:
    """Measure one run; what went wrong is written to failed.json, and tried again next time."""
    setting = Setting.read(json.loads((output / "setting.json").read_text())["setting"])
    torch.set_num_threads(setting.threads)
    folder = output / name
    (folder / FAILED).unlink(missing_ok=True)
    try:
        with signals.graceful():
            found = measure(name, setting, output)
    except (KeyboardInterrupt, Interrupted):
        return INTERRUPTED
    except RobustKDError as error:
        write_json(folder / FAILED, {"name": name, "what": error.what, "where": error.where, "fix": error.fix})
        print(f"{name}: {error.what}", file=sys.stderr)
        return 1
    write_json(folder / MEASURED, found)
    return 0


def measure(name: str, setting: Setting, output: Path) -> dict[str, Any]:
    """Train where there is something to train, and attack the best weights."""
    load_before = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    told: dict[str, Any] = {"name": name, "setting": setting.plain(), "load_before": load_before}
    told |= {"hardware": hardware(), "versions": versions(), "threads": setting.threads}
    recipe = clean_recipe(setting)
    if name == ROBUST_TEACHER:
        net = _shipped_teacher()
    else:
        if name != CLEAN_TEACHER:
            label, _, seed = name.rpartition("-s")
            (row,) = choose([label], setting.epochs)
            recipe = recipe_for(row, int(seed), setting, (output / CLEAN_TEACHER / "checkpoint").resolve())
            told |= {"label": label, "seed": int(seed), "note": row.note}
            told["cost"] = _counted(row, recipe)
        bundle = train(recipe, output / name)
        net = load_net(bundle)
        told |= {"selected": bundle.manifest.model_dump()["selected"], **_speed(bundle, recipe)}
    told["recipe"] = recipe.model_dump(mode="json")
    return told | {"flags": judge(net, recipe, setting)}


def train(recipe: Recipe, folder: Path) -> Bundle:
    """The finished checkpoint of the folder, or a training begun or resumed there."""
    told = folder / WORK / "recipe.json"
    done = (folder / "checkpoint").exists()
    if told.is_file() and not done and difference(json.loads(told.read_bytes()), recipe.model_dump(mode="json")):
        shutil.rmtree(folder / WORK)  # half a training of a recipe that has changed since is of no use
    return distill(recipe, folder, resume=told.is_file() or done)


def judge(net: nn.Module, recipe: Recipe, setting: Setting) -> dict[str, str]:
    """What survives, image by image: "1" where the answer is right (after all attacks up to this one, for AutoAttack)."""
    net.requires_grad_(False)
    images = recipe.dataset.load("test")
    count = min(max(setting.n, setting.attack_n), len(images))
    part = images.take(np.arange(count))
    x, y = torch.from_numpy(part.floats()), torch.from_numpy(part.labels)
    right = answered(net, x, y)
    n, attack_n = min(setting.n, count), min(setting.attack_n, count)
    flags = {"clean": right[:n]}
    flags["pgd-20"] = right[:n] & survivors("pgd", {"steps": 20}, net, x[:n], y[:n], recipe.threat)
    alive = right[:attack_n].copy()
    for name in setting.attacks:
        left = np.flatnonzero(alive)
        alive[left] = survivors(name, setting.knobs(name), net, x[left], y[left], recipe.threat)
        flags[name] = alive.copy()
    flags["autoattack"] = alive
    return {name: "".join("01"[int(flag)] for flag in values) for name, values in flags.items()}


def survivors(name: str, knobs: dict[str, int], net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Flags:
    """Which images one attack leaves right, (N,); judged on what it returns."""
    attack = Shelf("attacks").get(name)(**knobs)
    left = np.zeros(len(x), dtype=np.bool_)
    for first in range(0, len(x), BATCH):
        part = slice(first, first + BATCH)
        left[part] = answered(net, attack.perturb(net, x[part], y[part], threat, seed=first).x_adv, y[part])
    return left


@torch.no_grad()
def answered(net: nn.Module, x: Tensor, y: Tensor) -> Flags:
    """Where the network gives the label."""
    parts = [net(x[first : first + BATCH]).argmax(1) for first in range(0, len(x), BATCH)]
    return np.asarray((torch.cat(parts) == y).cpu().numpy())


def _speed(bundle: Bundle, recipe: Recipe) -> dict[str, float]:
    """Seconds of a training step, the median over the logged ones."""
    lines = [json.loads(line) for line in bundle.file("metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
    return {"seconds_per_step": recipe.train.batch_size / statistics.median(rates)}


def _counted(row: Row, recipe: Recipe) -> dict[str, Any]:
    """Passes per training image, in units of a forward pass of the network named."""
    return asdict(cost_of(row.method, steps=recipe.inner.steps, knobs=row.knobs))


def _shipped_teacher() -> nn.Module:
    nets, _ = load_teachers((TeacherConfig(id=CARD),), channels=1, classes=10, device=torch.device("cpu"))
    return nets["robust"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
