"""Methods with state in a real run: resumed to the bit, logged as it moves, driven by the losses of the very step."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkd.bundle import Bundle
from robustkd.errors import Interrupted
from robustkd.methods.advfunmatch import Advfunmatch
from robustkd.methods.b_mtard import BMtard
from robustkd.models._files import read_state
from robustkd.recipe.schema import Recipe
from robustkd.training import checkpoint
from robustkd.training.verb import WORK, distill
from tests.two_teachers import two_teachers

SMALL = {
    "dataset": {"name": "fashion-mnist-10k", "holdout": 40, "train_n": 200},
    "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
    "method": {"name": "b-mtard", "mu": 0.05},
    "inner": {"steps": 1, "step_size": "4/255"},
    "train": {
        "epochs": 2,
        "batch_size": 32,
        "threads": 1,
        "tensorboard": False,
        "save_every": 3,
        "schedule": {"name": "step", "milestones": [1]},
    },
}


def recipe(folder: Path, **sections: dict) -> Recipe:
    """The small run with two random teachers written to `folder`."""
    return Recipe.model_validate({**SMALL, "teachers": two_teachers(folder), **sections})


def metrics(bundle: Bundle) -> list[dict]:
    lines = [json.loads(line) for line in (bundle.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("images_per_s", "inner_share")} for m in lines]


def states(monkeypatch: pytest.MonkeyPatch, *, stop: int | None = None) -> list:
    """Every state that training goes through from now on; after `stop` of them a signal asks for an end."""
    advance, seen = BMtard.advance, []

    def shown(self, state, terms, clock):
        if len(seen) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        after = advance(self, state, terms, clock)
        seen.append((after, dict(terms), clock))
        return after

    monkeypatch.setattr(BMtard, "advance", shown)
    return seen


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_stopped_run_resumes_to_the_same_bits_state_included(tmp_path, monkeypatch, stop):
    plan = recipe(tmp_path)
    with monkeypatch.context() as patch:
        uncut = states(patch)
        whole = distill(plan, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before = states(patch, stop=stop)
        distill(plan, tmp_path / "cut")
    with monkeypatch.context() as patch:
        after = states(patch)
        cut = distill(plan, tmp_path / "cut", resume=True)
    assert 0 < len(before) < len(uncut) == len(before) + len(after)
    assert [state for state, *_ in before + after] == [state for state, *_ in uncut]
    assert uncut[-1][0] not in {state for state, *_ in uncut[:-1]}, "the state moves to the end"
    for name in ("model.safetensors", "last.safetensors"):
        a, b = read_state(whole.path / name), read_state(cut.path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(whole) == metrics(cut)


def test_the_saved_state_holds_all_of_it(tmp_path, monkeypatch):
    plan = recipe(tmp_path)
    with pytest.raises(Interrupted):
        seen = states(monkeypatch, stop=3)
        distill(plan, tmp_path / "cut")
    net = plan.student.build(channels=1, classes=10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    _, progress = checkpoint.restore(tmp_path / "cut" / WORK / "state.safetensors", net, optimizer)
    assert progress.method_state == vars(seen[-1][0])
    assert {"w_adv", "w_nat", "first_adv", "first_nat", "tau_adv", "tau_nat"} == progress.method_state.keys()


def test_the_log_joins_the_losses_with_the_weights_beside_them(tmp_path, monkeypatch):
    seen = states(monkeypatch)
    made = distill(recipe(tmp_path), tmp_path / "run")
    steps = [m for m in metrics(made) if "loss" in m]
    assert steps[0]["w_adv"] == 0.5 and steps[-1]["w_adv"] != 0.5 and steps[-1]["tau_nat"] != steps[-1]["tau_adv"]
    for line in steps:
        joined = line["w_adv"] * line["kl_adv"] + line["w_nat"] * line["kl_clean"]
        assert line["loss"] == pytest.approx(joined, rel=1e-5)
    last, _, _ = seen[-1]
    assert {k: steps[-1][k] for k in ("w_adv", "w_nat", "tau_adv", "tau_nat")} == BMtard.gauges(None, last)
    moves = [abs(b[0].tau_nat - a[0].tau_nat) for a, b in itertools.pairwise(seen)]
    per_epoch = len(seen) // 2
    assert max(moves[: per_epoch - 1]) == pytest.approx(0.05)
    assert max(moves[per_epoch:]) == pytest.approx(0.005), "the temperature's step falls with the learning rate"
    assert [clock.lr_scale for *_, clock in seen] == pytest.approx([1.0] * per_epoch + [0.1] * per_epoch)


def test_advfunmatch_searches_around_the_augmented_images(tmp_path, monkeypatch):
    loss, seen = Advfunmatch.loss, []

    def shown(self, nets, batch, state, clock):
        seen.append((batch.x.clone(), batch.x_adv.clone()))
        return loss(self, nets, batch, state, clock)

    monkeypatch.setattr(Advfunmatch, "loss", shown)
    train = {**SMALL["train"], "epochs": 1, "augment": ["crop", "flip"]}
    plan = recipe(tmp_path, method={"name": "advfunmatch"}, train=train, teachers=two_teachers(tmp_path)[:1])
    distill(plan, tmp_path / "run")
    raw = {image.tobytes() for image in plan.dataset.load("train").images}
    augmented = [(x * 255).round().to(torch.uint8).contiguous().numpy() for x, _ in seen]
    changed = np.mean([image.tobytes() not in raw for batch in augmented for image in batch])
    assert changed > 0.5, "most images are cropped or mirrored"
    assert all((x_adv - x).abs().max() <= plan.threat.eps + 1e-6 for x, x_adv in seen)
    assert all(not torch.equal(x_adv, x) for x, x_adv in seen)
