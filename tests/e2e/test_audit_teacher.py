"""`robustkd audit teacher:NAME`: the network of a teacher card, through the real command line."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import robustkd as rk
from robustkd.bundle import Bundle
from tests.conftest import ROOT, Outcome

Command = Callable[..., Outcome]
NAME = "fashion-mnist-resnet18"
POLICY = "noise_draws: 2\npgd_steps: 5\napgd_steps: 5\ntargets: 1\nsquare_queries: 5\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(POLICY + "fresh_process: false\n")
    return file


def test_a_teacher_is_audited_white_box_on_the_data_of_its_card(cli: Command, tmp_path: Path) -> None:
    policy = tmp_path / "fresh.yaml"  # with a fresh process, which opens the teacher by its name
    policy.write_text(POLICY)
    done = cli("audit", f"teacher:{NAME}", "--policy", policy, "--n", 40, "--min-robust", 30, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["artifact"]["path"] == f"teacher:{NAME}" and result["artifact"]["runtime"] == "pytorch"
    assert "efe42ef348133f82309ca2f230754894c17f663c35611a832ac611c597656ac6" in result["artifact"]["sha256"]
    assert result["source"] is None and result["dataset"]["name"] == "fashion-mnist" and result["threat"]["eps"] == 8 / 255
    assert {attack["level"] for attack in result["engine"]["attacks"].values()} == {"baseline", "surrogate", "blackbox"}
    # its card says 89.3 % clean and 85.2 % under PGD-10; 40 images leave about five points either way
    assert result["engine"]["clean_accuracy"]["low"] < 0.893 < result["engine"]["clean_accuracy"]["high"]
    assert result["engine"]["robust_accuracy"]["estimate"] > 0.6
    folder = tmp_path / "runs" / f"teacher-{NAME}" / "audit"
    assert Bundle.open(folder, kind="audit").manifest.parent is None
    assert cli("report", folder, "--output", tmp_path / "page.html").code == 0
    assert f"teacher:{NAME}" in (tmp_path / "page.html").read_text()


def test_a_finished_audit_of_a_teacher_is_not_repeated(command: Command, policy: Path) -> None:
    options = ("audit", f"teacher:{NAME}", "--policy", policy, "--n", 8)
    assert command(*options).code == 11, "without a floor there is nothing to hold it against"
    assert command(*options).code == 5
    assert command(*options, "--resume").code == 11


def test_options_override_the_card(command: Command, policy: Path) -> None:
    options = ("--policy", policy, "--n", 8, "--dataset", "fashion-mnist-10k", "--eps", "4/255", "--output", "there", "--json")
    done = command("audit", f"teacher:{NAME}", *options)
    result = json.loads(done.stdout)
    assert result["dataset"]["name"] == "fashion-mnist-10k" and result["threat"]["eps"] == 4 / 255
    assert Bundle.open(Path("there"), kind="audit")


def test_an_unknown_teacher_is_3_with_the_nearest_name(cli: Command) -> None:
    code, out, err = cli("audit", "teacher:fashion-mnist-resnet19")
    assert (code, out) == (3, "") and f"did you mean {NAME}?" in err


def test_missing_weights_are_5(cli: Command, tmp_path: Path) -> None:
    """A robustkd without its weight files, which the working folder puts before the installed one."""
    shutil.copytree(ROOT / "robustkd", tmp_path / "robustkd", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    code, out, err = cli("audit", f"teacher:{NAME}", "--n", 8)
    assert (code, out) == (5, "") and "fashion_mnist_resnet18.safetensors" in err and "fix: " in err


def test_images_of_another_kind_are_5(command: Command, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "colour.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4))
    code, _, err = command("audit", f"teacher:{NAME}", "--dataset", "colour.npz", "--n", 4)
    assert code == 5 and "(3, 32, 32)" in err and "Traceback" not in err


def test_python_takes_a_teacher_as_well(policy: Path, tmp_path: Path) -> None:
    assert {"artifact", "source", "n", "policy"} <= set(inspect.signature(rk.audit).parameters)
    result, folder = rk.audit(artifact=f"teacher:{NAME}", policy=str(policy), n=8, output=tmp_path / "audit")
    assert result.dataset.n == 8 and folder == tmp_path / "audit"
