"""Add-ons through the real command line: refused by name, resumed to the bit, and the average is what is exported."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustkd.engines._open import open_engine
from robustkd.models._files import read_state
from robustkd.recipe.schema import Recipe
from tests.conftest import environment

SMALL = """\
dataset: {name: fashion-mnist-10k, holdout: 40, train_n: 320}
student: {name: resnet18, width: 0.0625, stem_stride: 2}
method: {name: rslad}
teachers: [{id: fashion-mnist-resnet18}]
inner: {steps: 1, step_size: 8/255}
train: {epochs: 2, batch_size: 32, threads: 1, save_every: 2, tensorboard: false}
addons:
  awp: {gamma: 0.01}
  igdm: {alpha: 1}
  entropy_weights: {}
  average: {name: ema, decay: 0.8}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "method=pgd-at", "--set", "teachers=[]"], "addons.igdm needs a robust teacher, and pgd-at has none"),
        (["--set", "method=saad"], "addons.igdm is part of saad already"),
        (["--set", "addons.awp.start_epoch=2"], "it never acts"),
        (["--set", "addons.awp.gama=1"], "did you mean gamma?"),
        (["--set", "addons.swa={}"], "addons.swa is not a field"),
    ],
)
def test_an_add_on_that_cannot_be_is_exit_3_and_named(command, tmp_path, small, options, words):
    done = command("distill", "--recipe", small, "--output", tmp_path / "out", *options)
    assert done.code == 3 and words in done.stderr and "fix:" in done.stderr, done.stderr
    assert "small.yaml" in done.stderr or "--set" in done.stderr
    assert not (tmp_path / "out").exists()


def test_add_ons_are_shown_with_where_they_come_from(command, small):
    done = command("show", "recipe", small, "--set", "addons.awp.gamma=0.02", "--set", "addons.igdm=null")
    rows = {line.split("#")[0].strip(): line.partition("#")[2].strip() for line in done.stdout.splitlines()}
    assert done.code == 0 and rows["gamma: 0.02"] == "--set addons.awp.gamma=0.02"
    assert rows["igdm: null"] == "--set addons.igdm=null" and rows["decay: 0.8"] == "small.yaml, line 11"
    assert rows["start_epoch: 0"] == "default"


def test_a_killed_run_with_add_ons_resumes_to_the_same_bits_and_its_average_is_exported(cli, tmp_path, small):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli("distill", "--recipe", small, "--output", whole).code == 0
    command = [sys.executable, "-m", "robustkd", "distill", "--recipe", str(small), "--output", str(cut)]
    victim = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state, deadline = cut / ".training" / "state.safetensors", time.monotonic() + 120
    while not state.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert state.exists() and not (cut / "checkpoint").exists()
    assert cli("distill", "--recipe", small, "--output", cut, "--resume").code == 0
    for name in ("model", "last"):
        a, b = (read_state(run / "checkpoint" / f"{name}.safetensors") for run in (whole, cut))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    assert cli("export", cut, "--target", "cpu-fp32").code == 0
    net = Recipe.model_validate(_read(small)).student.build(channels=1, classes=10).eval()
    kept = read_state(state)
    net.load_state_dict({k.removeprefix("best."): v for k, v in kept.items() if k.startswith("best.")})
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with open_engine(next(cut.glob("**/model.onnx"))) as engine, torch.no_grad():
        assert torch.allclose(torch.from_numpy(engine.logits(x.numpy())), net(x), rtol=1e-3, atol=1e-4)


def _read(file: Path) -> dict:
    import yaml

    return yaml.safe_load(file.read_text())
