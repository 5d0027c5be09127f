"""B-MTARD in two processes: loss weights and temperatures come from both, and stay the same in both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.two_teachers import two_teachers

pytestmark = pytest.mark.dist

RECIPE = {
    "dataset": {"name": "fashion-mnist-10k", "holdout": 40, "train_n": 256},
    "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
    "method": {"name": "b-mtard", "mu": 0.05},
    "inner": {"steps": 1, "step_size": "4/255"},
    "train": {"epochs": 1, "batch_size": 64, "threads": 1, "augment": ["flip"], "tensorboard": False},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes wrote down."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "tiny.yaml").write_text(json.dumps({**RECIPE, "teachers": two_teachers(folder)}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).with_name("state_worker.py")), str(folder / "tiny.yaml"), str(folder)]
    launched = subprocess.Popen([*launcher, *worker], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        _, said = launched.communicate(timeout=240)
    finally:
        launched.terminate()  # where they wait for each other: the launcher takes its processes with it
        launched.wait(60)
    assert launched.returncode == 0, said[-3000:]
    found = [json.loads((folder / f"state-{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["code"] for facts in found] == [0, 0], said[-3000:]
    return found


def test_both_hold_the_same_state_after_every_step(ranks):
    first, second = ([step["state"] for step in facts["steps"]] for facts in ranks)
    assert first == second and len(first) == 4
    assert len({state["w_adv"] for state in first}) > 1 and first[-1]["tau_nat"] > 1, "the state moves"


def test_the_state_is_driven_by_the_means_of_both_processes_losses_and_entropies(ranks):
    for step, one, other in zip(ranks[0]["steps"], ranks[0]["own"], ranks[1]["own"], strict=True):
        assert one["kl_adv"] != other["kl_adv"], "each has images of its own"
        means = {name: (one[name] + other[name]) / 2 for name in one}
        assert step["terms"] == pytest.approx(means, rel=1e-5)
    assert ranks[0]["steps"][0]["state"]["first_adv"] == ranks[0]["steps"][0]["terms"]["kl_adv"]
