"""Several targets from one checkpoint, int8 among them; calibration from the command line; files that are no engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from robustkd.bundle import Bundle
from tests.checkpoints import write_checkpoint
from tests.conftest import Outcome
from tests.e2e.test_chain import write_recipe
from tests.unit.onnx_graphs import linear, quantized, save

Command = Callable[..., Outcome]
VERDICTS = {"pass": 0, "inconclusive": 11, "invalid": 12, "fail": 10}


def test_a_recipe_with_two_targets_is_exported_audited_and_timed(command: Command, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    setting = "targets=[cpu-fp32, cpu-int8]"
    code, out, err = command("run", "--recipe", recipe, "--set", setting, "--output", "out", "--json")
    assert code in VERDICTS.values(), err
    told = json.loads(out)["targets"]
    assert list(told) == ["cpu-fp32", "cpu-int8"]
    assert code == max(VERDICTS[t["verdict"]] for t in told.values()) or code == 10
    results = {name: json.loads((tmp_path / "out" / name / "audit" / "result.json").read_text()) for name in told}
    assert {r["artifact"]["precision"] for r in results.values()} == {"fp32", "int8"}
    assert results["cpu-int8"]["source"]["sha256"] == results["cpu-fp32"]["source"]["sha256"]
    levels = {a["level"] for a in results["cpu-int8"]["engine"]["attacks"].values()}
    assert {"surrogate", "replay", "blackbox"} <= levels
    page = (tmp_path / "out" / "report.html").read_text()
    assert "cpu-int8" in page and "cpu-fp32" in page
    code, out, err = command("verify", "out/cpu-int8")
    assert code == 0, err
    code, out, _ = command("bench", "out/cpu-fp32", "out/cpu-int8", "--seconds", 0, "--batch", "8", "--json")
    assert code == 0 and [a["precision"] for a in json.loads(out)["artifacts"]] == ["fp32", "int8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "mine" / "checkpoint").path.parent


def test_every_option_of_int8_ends_in_the_manifest_and_on_the_screen(command: Command, run: Path, tmp_path: Path) -> None:
    options = ["--precision", "int8", "--precision", "fp16", "--int8-profile", "ort-cpu", "--keep-fp32", "layer4.1.conv2"]
    options += ["--calib-n", 16, "--calib-attack", "--calib-method", "minmax", "--calib-seed", 3, "--batch", "1:2:8"]
    code, out, err = command("export", run, *options, "--output", tmp_path / "out")
    assert code == 0, err
    assert "calibrated on 16 attacked images of fashion-mnist-10k, minmax" in out
    assert "most sensitive layers, by the mean logit difference of each alone: " in out
    extra: dict[str, Any] = Bundle.open(tmp_path / "out" / "onnx-int8-cpu").manifest.model_extra or {}
    calibration = extra["calibration"]
    assert (calibration["n"], calibration["method"], calibration["seed"]) == (16, "minmax", 3)
    assert calibration["attack"]["norm"] == "linf" and "percentile" not in calibration
    assert extra["target"]["batch"] == [1, 2, 8] and len(extra["lowering"]["kept"]) == 1
    weights = {t.name: t.data_type for t in onnx.load(str(tmp_path / "out/onnx-int8-cpu/model.onnx")).graph.initializer}
    assert weights["layer4.1.conv2.weight"] == onnx.TensorProto.FLOAT
    half = Bundle.open(tmp_path / "out" / "onnx-fp16")
    assert half.manifest.precision == "fp16" and "calibration" not in (half.manifest.model_extra or {})


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--calib", "gone.npz"], 5, "there is no such .npz file"),
        (["--calib", "colour.npz"], 5, "the model takes (1, 28, 28)"),
        (["--calib", "empty.npz"], 5, "no images"),
        (["--keep-fp32", "layer9.conv1"], 3, "the graph has no node layer9.conv1"),
    ],
)
def test_what_int8_refuses_leaves_nothing(arguments: list[str], code: int, says: str, command: Command, run: Path) -> None:
    np.savez("colour.npz", x=np.zeros((4, 3, 32, 32), np.uint8), y=np.arange(4))
    np.savez("empty.npz", x=np.zeros((0, 1, 28, 28), np.uint8), y=np.zeros(0, np.int64))
    outcome = command("export", run, "--precision", "int8", *arguments, "--output", "out")
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    first, *error = outcome.stderr.splitlines()
    assert first.startswith("checkpoint: ") and says in error[-3], error
    assert "at: " in error[-2] and "fix: " in error[-1]
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


def test_a_checkpoint_that_is_not_there(command: Command) -> None:
    for given in ("nowhere", "gone.onnx"):
        code, out, err = command("export", given, "--onnx")
        assert (code, out) == (5, "") and err.splitlines()[0] == "there is no such checkpoint or file", err
        assert given in err and len(err.splitlines()) == 3


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _outside(model: onnx.ModelProto) -> onnx.ModelProto:
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    return model


def _future(model: onnx.ModelProto) -> onnx.ModelProto:
    model.opset_import[0].version = 999
    return model


@pytest.mark.parametrize("verb", ["bench", "audit"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: b"these are notes", "not a usable ONNX file"),
        (lambda: linear().SerializeToString()[:200], "not a usable ONNX file"),
        (lambda: _outside(linear()).SerializeToString(), "weights.bin"),
        (lambda: _future(linear()).SerializeToString(), "999"),
        (lambda: linear(shape=(2, "height", 5)).SerializeToString(), "is not an image classifier: its input images has shape"),
    ],
    ids=["no ONNX", "truncated", "external data", "opset", "free height"],
)
def test_files_that_cannot_run(verb: str, make: Any, says: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(make())
    options = ["--dataset", "fashion-mnist-10k", "--eps", "8/255"] if verb == "audit" else []
    outcome = command(verb, "model.onnx", *options)
    assert outcome.code == 5, outcome.stderr
    error = outcome.stderr.splitlines()
    assert says in error[0] and len(error) == 3 and "fix:" in error[-1]


def test_images_of_another_size(command: Command, tmp_path: Path) -> None:
    save(quantized(), tmp_path)
    outcome = command("audit", "model.onnx", "--dataset", "fashion-mnist-10k", "--eps", "8/255")
    assert outcome.code == 5 and "takes images of shape (2, 5, 5)" in outcome.stderr
