"""Two processes train the student that one trains: same batches, same steps, weights within 1e-5 after 20 of them.

Every method with a state that it learns from all processes' losses, and one of each kind beside them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustkd.catalog import Shelf
from robustkd.methods._base import Method
from robustkd.models._files import portable
from robustkd.models.resnet18 import ENTRY as ResNet18
from tests.conftest import environment
from tests.dist.parity_worker import grouped

pytestmark = pytest.mark.dist

SHELF = {name: Shelf("methods").get(name) for name in Shelf("methods").names()}
STATEFUL = [name for name, entry in SHELF.items() if entry.advance is not Method.advance]
NAMES = sorted({*STATEFUL, "dgad", "pgd-at", "rslad"})  # TRADES has no gradient where no noise is
MODEL = {"name": "resnet18", "width": 0.0625, "stem_stride": 2}


def recipe(name: str, folder: Path) -> dict:
    teachers = []
    for seed, role in enumerate(SHELF[name].roles):
        file = folder / f"{role}.safetensors"
        if not file.exists():
            torch.manual_seed(seed)
            net = ResNet18.model_validate(MODEL).build(channels=1, classes=10)
            save_file(portable(grouped(net)), file)
        teachers.append({"role": role, "path": str(file), "model": MODEL})
    return {
        "dataset": {"name": "fashion-mnist-10k", "holdout": 0, "train_n": 160},
        "student": MODEL,
        "teachers": teachers,
        "method": {"name": name, **({"mu": 0.05} if name == "b-mtard" else {})},
        "inner": {"steps": 2, "step_size": "4/255", "start": "zero"},  # noise is drawn by each process for itself
        "train": {"epochs": 2, "batch_size": 16, "threads": 1, "augment": [], "tensorboard": False, "device": "cpu"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and what two leave."""
    place = tmp_path_factory.mktemp("as-one")
    with torch.random.fork_rng():
        for name in NAMES:
            (place / f"{name}.yaml").write_text(json.dumps(recipe(name, place)))
    work = [str(Path(__file__).with_name("parity_worker.py")), str(place), *NAMES]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([sys.executable], two):
        done = subprocess.run([*launcher, *work], env=environment(), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    return place


def test_there_are_methods_with_a_state():
    assert {"b-mtard", "mtard"} <= set(STATEFUL)


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_one_process(name, folder):
    one, two = (load_file(folder / f"{name}-of-{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
