"""Add-ons in whole runs: what the recipe refuses, what is measured, logged and handed on, and resuming to the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from robustkd.bundle import Bundle
from robustkd.errors import ConfigError, Interrupted, NumericsError
from robustkd.methods import _guidance
from robustkd.models._files import load_net, read_state
from robustkd.recipe.reading import Source, validate
from robustkd.recipe.schema import Recipe
from robustkd.training import guidance
from robustkd.training.batches import Batches, Place, divide
from robustkd.training.loop import Loop
from robustkd.training.verb import WORK, distill

SMALL: dict[str, Any] = {
    "dataset": {"name": "fashion-mnist-10k", "holdout": 40, "train_n": 120},
    "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
    "method": {"name": "rslad"},
    "teachers": [{"id": "fashion-mnist-resnet18"}],
    "inner": {"steps": 1, "step_size": "8/255"},
    "train": {"epochs": 2, "batch_size": 32, "threads": 1, "tensorboard": False, "save_every": 3},
}
ALL = {
    "awp": {"gamma": 0.01},
    "igdm": {"alpha": 1.0},
    "entropy_weights": {"scale": 5.0},
    "average": {"name": "swa"},
}


def recipe(addons: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    values = {key: {**value} if isinstance(value, dict) else value for key, value in SMALL.items()}
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(values.get(name), dict) else changes
    return Recipe.model_validate({**values, "addons": addons or {}})


LABELS = {"method": {"name": "pgd-at"}, "teachers": []}


def end(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_state(folder / "checkpoint" / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "checkpoint" / "metrics.jsonl").read_text().splitlines()]


# --- the recipe


def test_add_ons_are_off_unless_asked_for() -> None:
    addons = recipe().addons
    assert addons.awp is addons.average is addons.igdm is addons.entropy_weights is None


@pytest.mark.parametrize(
    ("addons", "sections", "words"),
    [
        ({"igdm": {}}, LABELS, "addons.igdm needs a robust teacher, and pgd-at has none"),
        ({"entropy_weights": {}}, LABELS, "addons.entropy_weights needs a robust teacher, and pgd-at has none"),
        ({"igdm": {}}, {"method": {"name": "saad"}}, "addons.igdm is part of saad already"),
        ({"entropy_weights": {}}, {"method": {"name": "saad"}}, "addons.entropy_weights is part of saad already"),
        ({"awp": {"start_epoch": 2}}, {}, "addons.awp.start_epoch is 2, and epochs run from 0 to 1: it never acts"),
        ({"average": {"name": "swa", "start_epoch": 95}}, {}, "addons.average.start_epoch is 95"),
        ({"average": {"name": "swa", "decay": 0.9}}, {}, "swa is a plain mean and has no decay"),
        ({"average": {"name": "wma"}}, {}, "addons.average.name"),
        ({"average": {"name": "ema", "decay": 1.0}}, {}, "addons.average.decay"),
        ({"awp": {"gama": 0.1}}, {}, "addons.awp.gama is not a field"),
        ({"awp": {"gamma": -1}}, {}, "addons.awp.gamma"),
        ({"ema": {}}, {}, "addons.ema is not a field"),
    ],
)
def test_an_add_on_that_cannot_be_is_refused_by_name(addons: Any, sections: dict[str, Any], words: str) -> None:
    values = {**SMALL, **{key: value for key, value in sections.items()}, "addons": addons}
    with pytest.raises(ConfigError) as refused:
        validate(Recipe, Source(values))
    assert words in refused.value.what and refused.value.fix


def test_every_key_of_the_section_explains_itself() -> None:
    schema = Recipe.model_json_schema()["$defs"]
    for name in ("AddonsConfig", "AwpConfig", "AverageConfig", "IgdmConfig", "EntropyWeightsConfig"):
        assert all(len(field["description"]) > 10 for field in schema[name]["properties"].values()), name


# --- what a run does


def test_awp_with_gamma_zero_and_ema_without_memory_are_the_plain_run(tmp_path: Path) -> None:
    distill(recipe(**LABELS), tmp_path / "plain")
    distill(recipe({"awp": {"gamma": 0.0}, "average": {"name": "ema", "decay": 0.0}}, **LABELS), tmp_path / "zero")
    plain, zero = end(tmp_path / "plain"), end(tmp_path / "zero")
    assert all(torch.allclose(plain[key], zero[key], rtol=1e-5, atol=1e-7) for key in plain)
    plain_state, zero_state = (read_state(tmp_path / name / WORK / "state.safetensors") for name in ("plain", "zero"))
    assert same(zero, {k.removeprefix("student."): v for k, v in zero_state.items() if k.startswith("student.")})
    assert not any(key.startswith("average.") for key in plain_state)


@pytest.mark.parametrize("average", [{"name": "ema", "decay": 0.8}, {"name": "swa"}])
def test_the_average_is_what_is_measured_selected_and_handed_on(tmp_path: Path, average: dict[str, Any]) -> None:
    made = distill(recipe({"average": average}, **LABELS), tmp_path)
    state = read_state(tmp_path / WORK / "state.safetensors")
    kept = {k.removeprefix("average."): v for k, v in state.items() if k.startswith("average.")}
    student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    assert same(end(tmp_path), kept) and not same(end(tmp_path), student)
    best = {k.removeprefix("best."): v for k, v in state.items() if k.startswith("best.")}
    assert same(end(tmp_path, "model"), best) and same(load_net(made).state_dict(), best)
    facts = Bundle.open(made.path, kind="checkpoint").manifest.model_extra or {}
    assert facts["selected"]["last"]["clean"] == accuracy(end(tmp_path))
    assert facts["selected"]["last"]["clean"] == lines(tmp_path)[-1]["clean_accuracy"]


def accuracy(state: dict[str, torch.Tensor]) -> float:
    """Clean accuracy on the held-out images, computed here."""
    asked = recipe(**LABELS)
    _, held = divide(asked.dataset.load("train"), asked)
    net = asked.student.build(channels=1, classes=10).eval()
    net.load_state_dict(state)
    with torch.no_grad():
        right = net(torch.from_numpy(held.floats())).argmax(1) == torch.from_numpy(held.labels)
    return float(right.double().mean())


@pytest.mark.parametrize("holdout", [0, 40])
def test_swa_is_handed_on_with_statistics_measured_on_the_training_images(tmp_path: Path, holdout: int) -> None:
    asked = recipe({"average": {"name": "swa"}}, dataset={"holdout": holdout}, **LABELS)
    distill(asked, tmp_path)
    state = end(tmp_path)
    net = asked.student.build(channels=1, classes=10)
    net.load_state_dict(state)
    first = next(module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))
    train, _ = divide(asked.dataset.load("train"), asked)
    batches = Batches(train, asked.train, seed=asked.seed, place=Place(0, 1, torch.device("cpu")))
    outputs: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, given: outputs.append(given[0].mean((0, 2, 3))))
    expected = first.running_mean.clone()
    with torch.no_grad():
        for _, x, _ in batches.epoch(1):
            net.train()(x)
    assert torch.allclose(torch.stack(outputs).mean(0), expected, rtol=1e-3, atol=1e-5)


def test_the_log_has_the_terms_of_the_add_ons(tmp_path: Path) -> None:
    distill(recipe(ALL), tmp_path)
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert steps and all({"igdm", "awp_shift", "weight_mean", "kl_adv"} <= line.keys() for line in steps)
    assert all(line["awp_shift"] > 0 and line["weight_mean"] > 0 and line["igdm"] > 0 for line in steps)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask for a stop, as a signal would, within one optimiser step."""
    take = Loop.step

    def watched(self: Loop, x: Any, y: Any, clock: Any, *, report: bool) -> Any:
        if clock.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, x, y, clock, report=report)

    monkeypatch.setattr(Loop, "step", watched)


LATE_AWP = {"average": {"name": "ema", "decay": 0.9}, "awp": {"start_epoch": 1}}
LATE_SWA = {"average": {"name": "swa", "start_epoch": 1}}


@pytest.mark.parametrize(
    ("addons", "sections", "step"),
    [
        (ALL, {}, 3),  # the first epoch's last step
        (ALL, {}, 5),
        (LATE_AWP, LABELS, 1),
        (LATE_AWP, LABELS, 6),
        (LATE_SWA, {"method": {"name": "saad"}, "dataset": {"holdout": 0}}, 6),
    ],
    ids=["all, 3", "all, 5", "ema and late awp, 1", "ema and late awp, 6", "saad and late swa, 6"],
)
def test_a_stopped_run_with_add_ons_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addons: Any, sections: Any, step: int
) -> None:
    asked = recipe(addons, **sections)
    distill(asked, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, step)
        distill(asked, tmp_path / "cut")
    distill(asked, tmp_path / "cut", resume=True)
    for name in ("last", "model"):
        assert same(end(tmp_path / "whole", name), end(tmp_path / "cut", name))
    timing = ("images_per_s", "inner_share")
    logs = [[{k: v for k, v in line.items() if k not in timing} for line in lines(tmp_path / run)] for run in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_stop_while_swa_measures_its_statistics_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe({"average": {"name": "swa"}}, **LABELS)
    distill(asked, tmp_path / "whole")
    settle = Loop._settle

    def interrupted(self: Loop, epoch: int) -> None:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        settle(self, epoch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Loop, "_settle", interrupted)
        distill(asked, tmp_path / "cut")
    distill(asked, tmp_path / "cut", resume=True)
    assert same(end(tmp_path / "whole"), end(tmp_path / "cut"))


def test_an_add_on_that_is_not_a_number_stops_the_run_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def broken(teacher: Any, student: Any) -> torch.Tensor:
        gap = _guidance.difference_gap(teacher, student)
        return gap * float("nan") if next(calls) == 5 else gap

    monkeypatch.setattr(guidance, "difference_gap", broken)
    with pytest.raises(NumericsError, match="igdm is nan in step 5"):
        distill(recipe({"igdm": {}, "average": {"name": "ema"}}), tmp_path)
    state = read_state(tmp_path / WORK / "state.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_a_gradient_longer_than_its_limit_is_shortened_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """Read off the first step of plain SGD: without momentum and decay its length is lr times that of the gradient."""
    distances: list[float] = []
    take = Loop.step

    def watched(self: Loop, x: Any, y: Any, clock: Any, *, report: bool) -> Any:
        before = [p.detach().clone() for p in self.student.parameters()]
        values = take(self, x, y, clock, report=report)
        moved = [(p.detach() - b).double().norm() for p, b in zip(self.student.parameters(), before, strict=True)]
        distances.append(float(torch.stack(moved).norm()) / values["lr"])
        return values

    monkeypatch.setattr(Loop, "step", watched)
    plain = {"epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "schedule": {"name": "constant"}}
    distill(recipe(train={**plain, "grad_clip": limit, "batch_size": 120}, **LABELS), tmp_path)
    assert distances[0] == pytest.approx(limit, rel=1e-2) if limit < 1 else 1e-2 < distances[0] < limit


@pytest.mark.parametrize(("select", "best"), [("pgd10", 0), ("clean", 2), ("weighted", 1)])
def test_best_means_what_select_says_and_last_is_kept_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, best: int
) -> None:
    from robustkd.training import loop
    from robustkd.training.evaluate import Accuracy

    told = iter([Accuracy(0.3, 0.3), Accuracy(0.6, 0.25), Accuracy(0.7, 0.1)])
    weights: list[dict[str, torch.Tensor]] = []

    def evaluate(net: Any, *args: Any, **named: Any) -> Accuracy:
        weights.append({key: value.clone() for key, value in net.state_dict().items()})
        return next(told)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    distill(recipe(train={"epochs": 3, "select": select}, **LABELS), tmp_path)
    assert same(end(tmp_path, "model"), weights[best]) and same(end(tmp_path), weights[2])


def test_a_recipe_with_add_ons_survives_its_own_dump() -> None:
    asked = recipe(ALL)
    assert Recipe.model_validate(json.loads(asked.model_dump_json())) == asked
    with pytest.raises(ValidationError):
        recipe({"awp": {"gamma": float("inf")}})
