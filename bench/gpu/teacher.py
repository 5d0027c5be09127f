"""Train a teacher in slices of minutes, write it as a file of fp16 weights, and measure what that file answers.

    python -m bench.gpu.teacher --data DATA --output OUT [--recipe FILE] [--set K=V] [--minutes 9]

The same command goes on until it ends with 0 (75: the time was up). Weights and card go to --zoo; left out, OUT/zoo.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.gpu import measure
from bench.gpu.common import (
    AGAIN,
    HERE,
    LIMIT_MB,
    Clock,
    Failed,
    TimeUp,
    data_set,
    graceful,
    parser,
    save,
    say,
    setting,
    write_text,
)
from bench.gpu.common import told as recorded
from robustkd import bundle as bundles
from robustkd.bundle import MANIFEST, Bundle, sha256
from robustkd.models._files import read_state
from robustkd.recipe.reading import read_yaml
from robustkd.training.teachers import Card

DRY = (
    "student={name: resnet18, width: 0.0625, stem_stride: 2}",
    "inner.steps=1",
    "train={epochs: 2, batch_size: 32, select_every: 1, save_every: 2, threads: 1, schedule: {warmup: 1}}",
    "dataset.holdout=20",
)
DRY_ADDONS = ("addons.awp.start_epoch=1",)


def main(argv: list[str]) -> int:
    told = parser(__doc__)
    told.add_argument("--recipe", type=Path, default=HERE / "teacher-rn18.yaml")
    told.add_argument("--set", action="append", default=[], metavar="K=V", help="over the recipe, as in `robustkd distill`")
    told.add_argument("--zoo", type=Path, help="where weights and card go; left out, below --output")
    told.add_argument("--name", help="of the teacher; left out, the recipe's, with the data set")
    told.add_argument("--n", type=int, default=5000, help="test images for clean, FGSM and PGD")
    told.add_argument("--attack-n", type=int, default=1000, help="test images for AutoAttack")
    asked = told.parse_args(argv)
    graceful()
    clock = Clock(asked.minutes)
    command = recorded("teacher", argv)
    try:
        found = teacher(asked, clock, command)
    except TimeUp:
        say("the time is up; the same command goes on")
        save(asked.output, "teacher", {"status": "unfinished"}, command)
        return AGAIN
    except Failed as error:
        say(str(error))
        return 1
    save(asked.output, "teacher", {"status": "done", **found}, command)
    say(f"{found['name']}: clean {found['figures']['clean']['estimate']:.1%}")
    return 0


def teacher(asked: argparse.Namespace, clock: Clock, command: list[str]) -> dict[str, Any]:
    """Train, write, measure; whatever is there already is kept."""
    data, recipe = data_set(asked), read_yaml(asked.recipe).values
    name = asked.name or f"{recipe['name']}-cifar10"
    words = ["--recipe", asked.recipe, *setting("dataset.name", "npz")]
    words += [word for key in ("train", "test") for word in setting(f"dataset.{key}", data[key])]
    dry = (*DRY, *(DRY_ADDONS if "addons" in recipe else ())) if asked.dry else ()
    words += [word for value in (*dry, *asked.set) for word in ("--set", value)]
    made = clock.distill(asked.output / "run", *words)
    zoo = asked.zoo or asked.output / "zoo"
    weights, rounded = zoo / f"{name}.safetensors", asked.output / "rounded" / "checkpoint"
    if not (rounded / MANIFEST).is_file():
        round_off(Bundle.open(made, kind="checkpoint"), rounded)
    zoo.mkdir(parents=True, exist_ok=True)
    bundles.write_atomic(weights, (rounded / "model.safetensors").read_bytes())
    if (size := weights.stat().st_size / 2**20) > LIMIT_MB:
        say(f"{weights.name} has {size:.1f} MiB, more than the {LIMIT_MB} MB that the repository takes")
    manifest = Bundle.open(rounded, kind="checkpoint").manifest
    adversarial = manifest.recipe["method"]["name"] not in ("standard", "kd")
    figures = measure.figures(rounded, data, 40 if asked.dry else asked.n, attack=adversarial)
    if adversarial:
        n = 8 if asked.dry else asked.attack_n
        figures["autoattack"] = measure.autoattack(clock, rounded, asked.output / "audit", data, n, dry=asked.dry)
    write_text(zoo / f"{name}.yaml", card(name, weights, manifest, figures, asked, command))
    return {"name": name, "weights": str(weights), "sha256": sha256(weights), "mib": round(size, 2), "figures": figures}


def round_off(made: Bundle, folder: Path) -> None:
    """A checkpoint bundle whose floats are held in fp16: what is measured is the file that others get."""
    from safetensors.torch import save_file

    state = read_state(made.file("model.safetensors"))
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if over := [key for key, value in half.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]:
        raise Failed(f"these weights do not fit into fp16: {', '.join(over[:5])}")
    told = made.manifest
    with bundles.create(
        folder, "checkpoint", parent=made, recipe=told.recipe, model=told.model, threat=told.threat, precision="fp16"
    ) as (work, _):
        save_file(half, work / "model.safetensors", metadata={"format": "pt"})


def card(
    name: str, weights: Path, manifest: Any, figures: dict[str, Any], asked: argparse.Namespace, command: list[str]
) -> str:
    """The teacher's card, as those of `robustkd/teachers` are; it is read back before it is written."""
    shape, recipe = manifest.model.input_shape, manifest.recipe
    student = {key: value for key, value in recipe["student"].items() if value is not None}
    robust = "autoattack" in figures
    test: dict[str, Any] = {
        "n": figures["n"],
        **{key: _told(figures[key]) for key in ("clean", "fgsm", "pgd20") if key in figures},
    }
    test["clean_interval"] = _interval(figures["clean"])
    if robust:
        attack = figures["autoattack"]
        test |= {"autoattack": _told(attack), "autoattack_n": attack["n"], "autoattack_interval": _interval(attack)}
        test |= {
            "policy": "dry run" if asked.dry else "standard AutoAttack",
            "seed": attack["seed"],
            "device": attack["device"],
        }
    train, method = recipe["train"], recipe["method"]["name"]
    values: dict[str, Any] = {
        "name": name,
        "summary": f"{student['name']}, {method}, {train['epochs']} epochs, {train['precision']}; weights in fp16",
        "model": student,
        "channels": shape[0],
        "classes": len(manifest.model.classes),
        "size": shape[1],
        "file": weights.name,
        "sha256": sha256(weights).removeprefix("sha256:"),
        "dataset": "cifar10",
        "threat": manifest.threat.model_dump(mode="json") if robust else None,
        "measured": {"test": test | {"command": " ".join(command)}},
        "licence": "Apache-2.0 (weights)",
    }
    values = {key: value for key, value in values.items() if value is not None}
    Card.model_validate(values)
    head = f"# Made by {asked.recipe.name} in bench/gpu; accuracies are fractions, intervals are Wilson's of 95 %.\n"
    return head + yaml.safe_dump(values, sort_keys=False, width=120, default_flow_style=None)


def _told(figure: dict[str, float]) -> float:
    return round(figure["estimate"], 4)


def _interval(figure: dict[str, float]) -> list[float]:
    return [round(figure["low"], 4), round(figure["high"], 4)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
