"""The whole chain through the real command line, on a small budget; then each way it can go wrong, by exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import Outcome, environment

TINY = """\
dataset: {name: fashion-mnist-10k, holdout: 60, train_n: 640}
student: {name: resnet18, width: 0.0625, stem_stride: 2}
method: {name: pgd-at}
inner: {steps: 2, step_size: 4/255}
train: {epochs: 2, batch_size: 64, lr: 0.2, threads: 1, save_every: 2, tensorboard: false}
targets: [cpu-fp32]
audit: {policy: POLICY, n: 40, tolerance: 10, batch_size: 40}
"""
POLICY = "{noise_draws: 2, pgd_steps: 2, apgd_steps: 3, targets: 2, square_queries: 10, fresh_process: false}\n"


def write_recipe(folder: Path, text: str = TINY) -> Path:
    policy = folder / "policy.yaml"
    policy.write_text("\n".join(f"{k}: {v}" for k, v in json.loads(_json(POLICY)).items()))
    recipe = folder / "tiny.yaml"
    recipe.write_text(text.replace("POLICY", str(policy)))
    return recipe


def _json(flow: str) -> str:
    return flow.replace("{", '{"').replace(": ", '": ').replace(", ", ', "')


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> tuple[Path, Outcome]:
    """One run of the chain; tests copy what they change."""
    home = tmp_path_factory.mktemp("chain")
    command = [sys.executable, "-m", "robustkd", "run", "--recipe", str(write_recipe(home)), "--output", "out", "--json"]
    done = subprocess.run(command, cwd=home, env=environment(), capture_output=True, text=True, timeout=300)
    return home / "out", Outcome(done.returncode, done.stdout, done.stderr)


def test_the_chain_ends_in_a_verdict_with_the_files_of_the_contract(chain):
    run, done = chain
    told = json.loads(done.stdout)
    target = told["targets"]["cpu-fp32"]
    verdicts = {"pass": 0, "fail": 10, "inconclusive": 11, "invalid": 12}
    assert done.code == verdicts[target["verdict"]], done.stderr
    assert {"run", "checkpoint", "targets", "seconds"} <= told.keys()
    assert {"distill", "export", "audit", "total"} == told["seconds"].keys()
    for file in (
        "checkpoint/model.safetensors",
        "checkpoint/metrics.jsonl",
        "checkpoint/manifest.json",
        "cpu-fp32/model.onnx",
        "cpu-fp32/audit/result.json",
        "cpu-fp32/audit/records.parquet",
        "cpu-fp32/audit/adversarial.npz",
        "report.html",
    ):
        assert (run / file).is_file(), file
    result = json.loads((run / "cpu-fp32/audit/result.json").read_text())
    assert result["engine"]["robust_accuracy"]["estimate"] == target["robust_accuracy"]
    assert {a["level"] for a in result["engine"]["attacks"].values()} == {"baseline", "replay", "surrogate", "blackbox"}
    assert pq.read_table(run / "cpu-fp32/audit/records.parquet").num_rows == 40
    assert "Traceback" not in done.stderr and "images/s" not in done.stdout


def test_the_adversarial_images_stay_in_the_ball(chain):
    run, _ = chain
    with np.load(run / "cpu-fp32/audit/adversarial.npz", allow_pickle=False) as held:
        delta = held["x_adv"].astype(np.float64) - held["x"]
        assert np.abs(delta).max() <= 8 / 255 + 1e-6
        assert held["x_adv"].min() >= 0 and held["x_adv"].max() <= 1


def test_every_bundle_verifies_and_one_flipped_byte_is_exit_5(chain, cli, tmp_path):
    run, _ = chain
    assert cli("verify", run).code == 0
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "cpu-fp32" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in (["verify", copy], ["audit", copy / "cpu-fp32", "--output", tmp_path / "a"]):
        done = cli(*command)
        assert done.code == 5 and "model.onnx" in done.stderr and "at:" in done.stderr
    assert not (tmp_path / "a" / "manifest.json").exists()


def audit_onnx(cli, run: Path, *options: str) -> Outcome:
    """Audit the file alone, away from the bundle that knows its source."""
    bare = run.parent / "bare.onnx"
    shutil.copy(run / "cpu-fp32" / "model.onnx", bare)
    fixed = ("--dataset", "fashion-mnist-10k", "--n", 40, "--policy", run.parent / "policy.yaml", "--output", "bare")
    return cli("audit", bare, *fixed, *options)


def test_a_bare_file_is_judged_by_its_floor(chain, cli):
    run, _ = chain
    done = audit_onnx(cli, run, "--eps", "8/255", "--min-robust", "99", "--json")
    assert done.code == 10, done.stderr
    result = json.loads(done.stdout)
    assert result["source"] is None and result["verdict"]["status"] == "fail"
    assert any(c["status"] == "skipped" for c in result["checks"])


def test_a_bare_file_without_source_or_floor_is_inconclusive(chain, cli):
    run, _ = chain
    done = audit_onnx(cli, run, "--eps", "8/255")
    assert done.code == 11 and "inconclusive" in done.stdout


def test_a_radius_on_the_255_scale_is_warned_about(chain, cli):
    run, _ = chain
    done = audit_onnx(cli, run, "--eps", "8")
    assert "8/255" in done.stderr and done.code in (10, 11, 12)


def test_a_truncated_file_is_exit_5(chain, cli, tmp_path):
    run, _ = chain
    cut = tmp_path / "cut.onnx"
    cut.write_bytes((run / "cpu-fp32/model.onnx").read_bytes()[:5000])
    done = cli("audit", cut, "--dataset", "fashion-mnist-10k", "--eps", "8/255")
    assert done.code == 5 and "cut.onnx" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--set", "train.epohcs=2"], 3, "did you mean epochs?"),
        (["--set", "train.epochs=many"], 3, "train.epochs"),
        (["--set", "method={name: dagd}"], 3, "did you mean dgad?"),
        (["--set", "method={name: dgad}"], 3, "wants robust"),
        (["--set", "targets=[jetson]"], 3, "jetson"),
        (["--set", "dataset={name: cifar10, root: /nowhere}"], 5, "CIFAR-10 is not here"),
        (["--set", "teachers=[{path: gone.safetensors, model: resnet18}]", "--set", "method={name: rslad}"], 5, "gone"),
        (["--set", "train.device=cuda"], 4, "no CUDA device"),
        (["--set", "train.lr=1e30"], 6, "diverged"),
    ],
)
def test_a_wrong_recipe_or_missing_file_says_what_where_and_how(cli, tmp_path, options, code, words):
    if "train.device=cuda" in options and _has_cuda():
        pytest.skip("this machine has a CUDA device")
    done = cli("run", "--recipe", write_recipe(tmp_path), "--output", tmp_path / "out", *options)
    assert done.code == code, done.stderr
    assert words in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "checkpoint").exists()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_line_of_the_users_own_file_is_named(cli, tmp_path):
    recipe = write_recipe(tmp_path, TINY.replace("lr: 0.2", "lrr: 0.2"))
    done = cli("distill", "--recipe", recipe)
    assert done.code == 3 and "tiny.yaml, line 5" in done.stderr and "did you mean lr?" in done.stderr


def test_a_missing_package_is_exit_4_with_its_install_line(cli, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "__init__.py").write_text("raise ImportError('no accelerate here')")
    path = os.pathsep.join([str(tmp_path), environment().get("PYTHONPATH", "")])
    done = cli("distill", "--recipe", write_recipe(tmp_path), env={"PYTHONPATH": path})
    assert done.code == 4 and "pip install 'robustkd[train]'" in done.stderr


def test_a_bug_is_exit_1_without_a_traceback_unless_asked(cli, tmp_path):
    """A third party's data set that raises what no one expects, found through its entry point."""
    (tmp_path / "boom.py").write_text(
        "from robustkd.datasets.fashion_mnist_10k import FashionMNIST10kConfig\n"
        "from typing import Literal\n"
        "class ENTRY(FashionMNIST10kConfig, frozen=True):\n"
        "    name: Literal['boom'] = 'boom'\n"
        "    def load(self, split):\n"
        "        raise ZeroDivisionError('boom')\n"
    )
    (tmp_path / "boom-1.dist-info").mkdir()
    (tmp_path / "boom-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: boom\nVersion: 1\n")
    (tmp_path / "boom-1.dist-info" / "entry_points.txt").write_text("[robustkd.datasets]\nboom = boom:ENTRY\n")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment().get("PYTHONPATH", "")])}
    command = ("distill", "--recipe", write_recipe(tmp_path), "--set", "dataset={name: boom}", "--output", tmp_path / "o")
    done = cli(*command, env=env)
    assert done.code == 1 and "bug in robustkd" in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "o")
    assert "Traceback" in cli("--debug", *command, env=env).stderr


def test_an_output_that_cannot_be_a_folder_is_exit_5(cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = cli("distill", "--recipe", write_recipe(tmp_path), "--output", tmp_path / "file" / "run")
    assert done.code == 5 and "--output" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_exit_5_and_leaves_nothing_half_written(cli, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        done = cli("distill", "--recipe", write_recipe(tmp_path), "--output", disk / "run")
        assert done.code == 5 and "No space left" in done.stderr, done.stderr
        assert not (disk / "run" / "checkpoint").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def start(tmp_path: Path, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "robustkd", *map(str, args)]
    return subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not list(path.parent.glob(path.name)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_leaves_a_run_that_resumes(cli, tmp_path, signum, code):
    recipe, out = write_recipe(tmp_path, TINY.replace("epochs: 2", "epochs: 60")), tmp_path / "out"
    process = start(tmp_path, "distill", "--recipe", recipe, "--output", out)
    wait_for(out / ".training" / "state.safetensors", process)
    second = cli("distill", "--recipe", recipe, "--output", out)
    assert second.code == 5 and "another run is using this folder" in second.stderr
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in err and "Traceback" not in err
    assert not (out / "checkpoint").exists()


def test_a_signal_in_an_audit_leaves_an_audit_that_resumes(chain, cli, tmp_path):
    run, _ = chain
    bundle = tmp_path / "cpu-fp32"
    shutil.copytree(run / "cpu-fp32", bundle, ignore=shutil.ignore_patterns("audit"))
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    slow = tmp_path / "slow.yaml"
    slow.write_text((run.parent / "policy.yaml").read_text().replace("apgd_steps: 3", "apgd_steps: 40"))
    options = ("audit", bundle, "--policy", slow, "--n", 300)
    process = start(tmp_path, *options)
    assert process.stderr is not None
    seen = next((line for line in process.stderr if "apgd-ce" in line), "")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert seen and process.returncode == 143 and "--resume" in err
    assert not (bundle / "audit" / "manifest.json").exists()
    done = cli(*options, "--resume", "--json")
    assert done.code in (0, 10, 11, 12), done.stderr
    assert json.loads(done.stdout)["engine"]["attacks"]["apgd-t"]["forward_calls"] > 0
