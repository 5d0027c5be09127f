"""`student_init`: the student starts from given weights as a whole, or the command says by name what does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustkd import api
from robustkd.bundle import Bundle
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError, ConfigError, Interrupted
from robustkd.models._files import read_state
from robustkd.recipe.schema import Recipe, StartConfig
from robustkd.training import loop as loops
from robustkd.training.start import read_start

STUDENT = {"name": "resnet18", "width": 0.0625}


def net(classes: int = 3, seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    built: nn.Module = Shelf("models").get("resnet18")(width=0.0625).build(channels=1, classes=classes)
    return built


def recipe(folder: Path, init: Any, **changes: Any) -> Recipe:
    """A run of one step at a rate of almost nothing: what comes out is what it started from."""
    rng = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=rng.integers(0, 256, (24, 1, 28, 28), dtype=np.uint8), y=np.arange(24) % 3)
    values = {
        "dataset": {"name": "npz", "train": [str(folder / "x.npz")], "holdout": 0},
        "student": STUDENT,
        "student_init": init,
        "method": "standard",
        "train": {
            "epochs": 1,
            "batch_size": 24,
            "lr": 1e-30,
            "weight_decay": 0,
            "tensorboard": False,
            "device": "cpu",
            "threads": 1,
        },
        **changes,
    }
    return Recipe.model_validate(values)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a step at no rate leaves alone: everything but the running statistics."""
    return {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key}


def trained(made: Bundle) -> dict[str, Tensor]:
    return weights(read_state(made.file("model.safetensors")))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=0, atol=1e-20) for key in a)


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}, "epoch": 3},
    "papers": lambda state: {"net": {f"module.{key}": value for key, value in state.items()}, "acc": 84.2, "epoch": 200},
    "without counters": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("form", FORMS)
def test_plain_files_and_those_of_the_papers_repositories(tmp_path: Path, form: str) -> None:
    torch.save(FORMS[form](net().state_dict()), tmp_path / "start.pt")
    made = api.distill(recipe(tmp_path, str(tmp_path / "start.pt")), tmp_path / "run")
    assert same(trained(made), weights(net().state_dict()))
    digest = hashlib.sha256((tmp_path / "start.pt").read_bytes()).hexdigest()
    facts = made.manifest.model_extra or {}
    assert facts["student_init"] == {"source": str(tmp_path / "start.pt"), "sha256": f"sha256:{digest}"}


def test_without_it_the_start_is_the_seeds_and_the_manifest_says_nothing(tmp_path: Path) -> None:
    made = api.distill(recipe(tmp_path, None), tmp_path / "run")
    assert not same(trained(made), weights(net().state_dict())) and "student_init" not in (made.manifest.model_extra or {})


def test_an_averaged_student_starts_there_as_well(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "start.safetensors")
    addons = {"average": {"name": "ema", "decay": 0.9}}
    made = api.distill(recipe(tmp_path, str(tmp_path / "start.safetensors"), addons=addons), tmp_path / "run")
    found, wanted = trained(made), weights(net().state_dict())
    assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)


@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_a_checkpoint_of_an_earlier_run(tmp_path: Path, inside: str) -> None:
    first = api.distill(recipe(tmp_path, None, seed=5), tmp_path / "first")
    second = api.distill(recipe(tmp_path, str(tmp_path / "first" / inside)), tmp_path / "second")
    assert same(trained(first), trained(second))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"width": 0.125}, "its width is 0.0625, here it is 0.125"),
        ({"stem_stride": 2}, "its stem_stride is 1, here it is 2"),
        ({"normalize": {"mean": [0.5], "std": [0.5]}}, "its normalize is None, here it is {'mean': "),
        ({"name": "mobilenet-v2"}, "its name is resnet18, here it is mobilenet-v2"),
    ],
)
def test_a_checkpoint_of_another_student_is_a_wrong_recipe(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    """Another stride or normalisation would fit every shape, and compute something else."""
    api.distill(recipe(tmp_path, None), tmp_path / "first")
    student = {**STUDENT, **changed} if "name" not in changed else {"name": "mobilenet-v2", "width": 0.0625}
    with pytest.raises(ConfigError) as caught:
        api.distill(recipe(tmp_path, str(tmp_path / "first"), student=student), tmp_path / "second")
    assert reason in caught.value.what and caught.value.where == str(tmp_path / "first" / "checkpoint")


def test_shapes_that_differ_are_named_one_by_one(tmp_path: Path) -> None:
    save_file(net(classes=5).state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(ArtifactError) as caught:
        api.distill(recipe(tmp_path, str(tmp_path / "start.safetensors")), tmp_path / "run")
    assert caught.value.what == "the file has another shape for linear.weight (5x32, not 3x32), linear.bias (5, not 3)"
    assert caught.value.fix == "it is for 5 classes, not 3: choose one of this data set"


@pytest.mark.parametrize("take", ["linear.bias", "layer1.0.conv1.weight"])
def test_a_part_is_never_loaded(tmp_path: Path, take: str) -> None:
    state = net().state_dict()
    del state[take]
    save_file({**state, "new.weight": torch.zeros(1)}, tmp_path / "start.safetensors")
    student, before = net(seed=1), net(seed=1).state_dict()
    start = read_start(
        StartConfig(path=str(tmp_path / "start.safetensors")), Shelf("models").get("resnet18")(width=0.0625), root=None
    )
    with pytest.raises(ArtifactError, match=rf"the file lacks {take}; has, unknown to the net, new\.weight"):
        start.into(student)
    assert same(dict(student.state_dict()), dict(before)), "and nothing was loaded"


def test_a_stated_digest_is_held(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "start.safetensors")
    init = {"path": str(tmp_path / "start.safetensors"), "sha256": "0" * 64}
    with pytest.raises(ArtifactError, match="is not the file described"):
        api.distill(recipe(tmp_path, init), tmp_path / "run")


def test_names_and_a_prefix_of_its_own(tmp_path: Path) -> None:
    state = {f"backbone.{key.replace('linear.', 'head.')}": value for key, value in net().state_dict().items()}
    save_file(state, tmp_path / "start.safetensors")
    init = {"path": str(tmp_path / "start.safetensors"), "prefix": "backbone.", "rename": {"head": "linear"}}
    made = api.distill(recipe(tmp_path, init), tmp_path / "run")
    assert same(trained(made), weights(net().state_dict()))


def test_a_whole_network_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a network, not weights"):
        api.distill(recipe(tmp_path, "torchvision:resnet18"), tmp_path / "run")


def test_a_resumed_run_goes_on_from_its_state_not_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(net().state_dict(), tmp_path / "start.safetensors")
    knobs = {"epochs": 3, "batch_size": 12, "lr": 0.05, "tensorboard": False, "device": "cpu", "threads": 1}
    plan = recipe(tmp_path, str(tmp_path / "start.safetensors"), train=knobs)
    whole = api.distill(plan, tmp_path / "whole")
    step, steps = loops.Loop.step, []

    def stopping(self: loops.Loop, *args: Any, **options: Any) -> Any:
        if len(steps) == 4:
            raise Interrupted(2)
        steps.append(1)
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "step", stopping)
        with pytest.raises(Interrupted):
            api.distill(plan, tmp_path / "cut")
    (tmp_path / "start.safetensors").unlink()  # nobody asks for it any more
    made = api.distill(plan, tmp_path / "cut", resume=True)
    ours, theirs = (load_file(bundle.file("model.safetensors")) for bundle in (made, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "to the same bits"
    told = [(bundle.manifest.model_extra or {})["student_init"] for bundle in (made, whole)]
    assert told[0] == told[1]


def test_a_run_stopped_before_its_first_state_reads_the_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(net().state_dict(), tmp_path / "start.safetensors")
    plan = recipe(tmp_path, str(tmp_path / "start.safetensors"))

    def stopped(self: loops.Loop, *args: Any, **options: Any) -> Any:
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "step", stopped)
        with pytest.raises(Interrupted):
            api.distill(plan, tmp_path / "run")
    made = api.distill(plan, tmp_path / "run", resume=True)
    assert same(trained(made), weights(net().state_dict()))


def test_it_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({"dataset": "fashion-mnist-10k", "student": STUDENT, "method": "standard"}))
    plan = api.load_recipe(tmp_path / "r.yaml", ["student_init=runs/first"])
    assert plan.student_init == StartConfig(path="runs/first")
    with pytest.raises(ConfigError, match="student_init"):
        api.load_recipe(tmp_path / "r.yaml", ["student_init={pth: x}"])
