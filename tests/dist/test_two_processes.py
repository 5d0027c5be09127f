"""Two processes on one CPU train one student: same weights, one bundle, each thing said once; an error ends both."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkd.bundle import Bundle
from robustkd.models._files import read_state
from robustkd.recipe.schema import Recipe
from robustkd.training.batches import divide
from tests.conftest import environment

pytestmark = pytest.mark.dist

RECIPE = {
    "dataset": {"name": "fashion-mnist-10k", "holdout": 40, "train_n": 256},
    "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
    "method": {"name": "pgd-at"},
    "inner": {"steps": 1, "step_size": "4/255"},
    "train": {"epochs": 1, "batch_size": 64, "threads": 1, "augment": ["flip"], "tensorboard": False},
}

#: the same with every add-on
ADDED = {
    "method": {"name": "rslad"},
    "teachers": [{"id": "fashion-mnist-resnet18"}],
    "addons": {"awp": {"gamma": 0.05}, "igdm": {}, "entropy_weights": {}, "average": {"name": "swa"}},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder, and what each of the two processes wrote down."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "tiny.yaml").write_text(json.dumps(RECIPE))
    (folder / "added.yaml").write_text(json.dumps(RECIPE | ADDED))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("worker.py")), str(folder / "tiny.yaml"), str(folder)]
    done = subprocess.Popen([*launcher, *worker], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        _, said = done.communicate(timeout=240)
    finally:
        done.terminate()  # where they wait for each other: the launcher takes its processes with it
        done.wait(60)
    assert done.returncode == 0, said[-3000:]
    assert "destroy_process_group" not in said  # torch's complaint about a group nobody left
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_both_end_well_with_the_same_weights(launched):
    folder, ranks = launched
    assert [facts["whole"]["code"] for facts in ranks] == [0, 0], ranks
    first, second = (read_state(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    last = read_state(folder / "run" / "checkpoint" / "last.safetensors")
    assert all(torch.equal(first[k], last[k]) for k in last)


def test_one_bundle_is_left_and_every_line_of_its_metrics_is_there_once(launched):
    folder, _ = launched
    bundle = Bundle.open(folder / "run" / "checkpoint", kind="checkpoint")  # compares every digest
    assert (bundle.manifest.model_extra or {})["training"]["processes"] == 2
    lines = [json.loads(line) for line in (bundle.path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [0, 3]
    assert [m["step"] for m in lines if "clean_accuracy" in m] == [3]
    assert sorted(f.name for f in (folder / "run").iterdir()) == [".lock", ".training", "checkpoint"]


def test_together_they_see_each_training_image_once(launched):
    _, ranks = launched
    recipe = Recipe.model_validate(RECIPE)
    train, _held = divide(recipe.dataset.load("train"), recipe)
    sums = np.asarray(train.images).astype(np.int64).sum((1, 2, 3))
    assert [len(facts["images"]) for facts in ranks] == [128, 128]
    assert sorted(ranks[0]["images"] + ranks[1]["images"]) == sorted(sums.tolist())


def test_only_the_main_process_speaks(launched):
    _, (main, other) = launched
    assert "checkpoint: " in main["whole"]["stdout"] and "epoch 1: held-out" in main["whole"]["stderr"]
    assert (other["whole"]["stdout"], other["whole"]["stderr"]) == ("", "")


def test_with_add_ons_both_move_and_average_alike(launched):
    """To the bit: a shift by a process's own gradient would set them apart when it is undone."""
    folder, ranks = launched
    assert [facts["added"]["code"] for facts in ranks] == [0, 0], ranks
    for name in ("added", "average"):
        first, second = (read_state(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name
    last = read_state(folder / "added" / "checkpoint" / "last.safetensors")
    assert all(torch.equal(first[k], last[k]) for k in last)


def test_the_smallest_of_a_number_is_that_of_all_processes(launched):
    _, ranks = launched
    assert [facts["smallest"] for facts in ranks] == [2.0, 2.0]


def test_an_error_ends_both_and_is_said_once(launched):
    _, (main, other) = launched
    assert main["again"]["code"] == other["again"]["code"] == 5
    assert "this run is finished" in main["again"]["stderr"] and other["again"]["stderr"] == ""


def test_a_loss_that_diverges_in_one_process_stops_both(launched):
    folder, (main, other) = launched
    assert main["broken"]["code"] == other["broken"]["code"] == 6
    assert "training diverged: loss is nan in step 2" in main["broken"]["stderr"] and other["broken"]["stderr"] == ""
    assert not (folder / "broken" / "checkpoint").exists()
