"""Real CIFAR-10 with a robust teacher by others (ResNet-20, PGD-7 training, 8/255): slow, and skipped without the files.

The expected figures are those its publisher's card states for the weights: 83.81 % clean on all 10,000 test images;
36.8 % under PGD-20 (step 2/255, one random start) on the first 500.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkd.bundle import ModelInfo, create
from robustkd.datasets.cifar10 import CLASSES
from robustkd.datasets.npz import NpzConfig
from robustkd.errors import NumericsError
from robustkd.recipe.schema import TeacherConfig
from robustkd.threat import ThreatModel
from robustkd.training.teachers import load_teachers
from robustkd.training.verify_teacher import Verifier
from tests.real_data import cifar10_npz, need_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TEACHER = "weights/cifar10_resnet20_pgdat8_a.safetensors"
NET = {"name": "cifar-resnet", "depth": 20, "shortcut": "pad_end"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, Path]:
    data = need_data("cifar10/cifar10_train_1.npz", "cifar10/cifar10_test_0000_4999.npz", TEACHER)
    train, test = cifar10_npz(tmp_path_factory.mktemp("cifar10"), train_parts=1)
    return train, test, data / TEACHER


def as_checkpoint(folder: Path, weights: Path, test: Path) -> None:
    """The teacher as a user would bring it into the chain: a checkpoint bundle around the weights."""
    told = {
        "recipe": {"student": NET, "dataset": {"name": "npz", "test": [str(test)], "classes": list(CLASSES)}},
        "model": ModelInfo(architecture="cifar-resnet", classes=CLASSES, input_shape=(3, 32, 32)),
        "threat": ThreatModel(),
    }
    with create(folder, "checkpoint", **told) as (work, _):
        shutil.copyfile(weights, work / "model.safetensors")


def audited(cli, folder: Path, policy: str, n: int) -> dict:
    (folder.parent / "policy.yaml").write_text(policy)
    done = cli("audit", folder, "--policy", folder.parent / "policy.yaml", "--n", n, "--min-robust", 20, "--json", timeout=1700)
    assert done.code in (0, 10, 11), done.stderr
    return json.loads(done.stdout)


def test_the_audit_reproduces_the_teachers_published_pgd_accuracy(cli, files, tmp_path):
    _, test, weights = files
    with np.load(test) as held:
        np.savez(tmp_path / "first.npz", x=held["x"][:500], y=held["y"][:500])
    as_checkpoint(tmp_path / "teacher", weights, tmp_path / "first.npz")
    pgd = "fresh_process: false\nnoise_draws: 2\npgd_steps: 20\napgd_steps: 0\ntargets: 0\nsquare_queries: 0\n"
    result = audited(cli, tmp_path / "teacher", pgd, 500)
    found = [a["robust_accuracy"] for name, a in result["engine"]["attacks"].items() if name == "pgd"]
    assert found == [pytest.approx(0.368, abs=0.010)]


def test_the_audit_reproduces_the_teachers_published_clean_accuracy(cli, files, tmp_path):
    _, test, weights = files
    as_checkpoint(tmp_path / "teacher", weights, test)
    clean = "fresh_process: false\nnoise_draws: 1\npgd_steps: 1\napgd_steps: 0\ntargets: 0\nsquare_queries: 0\n"
    result = audited(cli, tmp_path / "teacher", clean, 5000)
    assert result["engine"]["clean_accuracy"]["estimate"] == pytest.approx(0.8381, abs=0.010)


@pytest.mark.parametrize("normalize", [None, {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2471, 0.2435, 0.2616]}])
def test_it_is_measured_as_published_and_found_out_behind_a_normalisation_it_never_had(files, tmp_path, normalize):
    _, test, weights = files
    model = NET if normalize is None else {**NET, "normalize": normalize}
    teacher = {"path": str(weights), "model": model, "reported": {"clean": 0.8381, "pgd10": 0.368}}
    images = NpzConfig(name="npz", test=(test,), classes=CLASSES)
    lines: list[str] = []
    verifier = Verifier(images, torch.device("cpu"), tmp_path / "teachers.json", lines.append)

    def load() -> None:
        load_teachers(
            (TeacherConfig.model_validate(teacher),),
            channels=3,
            classes=10,
            size=(32, 32),
            device=torch.device("cpu"),
            threat=ThreatModel(),
            measure=verifier,
        )

    if normalize is None:
        load()
        assert len(lines) == 1 and lines[0].endswith("; as expected") and "of 1000 images, PGD-10 " in lines[0]
    else:
        with pytest.raises(NumericsError, match="does not answer as reported: clean "):
            load()


def test_a_student_learns_from_it_and_its_export_is_audited(cli, files, tmp_path):
    """Two epochs of 300 steps of DGAD: well above chance under attack, and the exported file agrees.

    A thousand images: on a hundred, the figure of one student goes ten points up or down with the choice of images.
    """
    train, test, weights = files
    policy = tmp_path / "policy.yaml"
    policy.write_text("noise_draws: 2\npgd_steps: 20\napgd_steps: 20\ntargets: 3\nsquare_queries: 0\n")
    recipe = {
        "dataset": {"name": "npz", "train": [str(train)], "test": [str(test)], "classes": list(CLASSES), "holdout": 400},
        "student": {"name": "resnet18", "width": 0.125},
        "teachers": [{"path": str(weights), "model": NET, "reported": {"clean": 0.8381, "pgd10": 0.368}}],
        "method": {"name": "dgad"},
        "inner": {"steps": 3, "step_size": "4/255"},
        "train": {"epochs": 2, "batch_size": 32, "schedule": {"name": "onecycle"}, "tensorboard": False},
        "audit": {"policy": str(policy), "n": 1000, "tolerance": 5},
    }
    (tmp_path / "cifar.yaml").write_text(json.dumps(recipe))
    done = cli("run", "--recipe", tmp_path / "cifar.yaml", "--output", tmp_path / "out", "--json", timeout=1700)
    assert done.code == 0, done.stderr
    target = json.loads(done.stdout)["targets"]["cpu-fp32"]
    assert target["clean_accuracy"] > 0.35 and target["robust_accuracy"] > 0.15
