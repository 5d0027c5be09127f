"""Engines through the command line: built for RTX where the builder is installed, refused with the way out where not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from robustkd.bundle import Bundle, create
from robustkd.engines._driver import probe
from tests.conftest import Outcome, environment
from tests.fake_tensorrt import rtx_installed
from tests.unit.onnx_graphs import images, linear, save

Command = Callable[..., Outcome]
without_gpu = pytest.mark.skipif(bool(probe().gpus), reason="this machine has a GPU")
with_rtx = pytest.mark.skipif(not rtx_installed(), reason="TensorRT-RTX is not installed: pip install 'robustkd[rtx]'")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """An onnx bundle, as it is copied to a board."""
    with create(tmp_path / "mine", "onnx", precision="fp32", threat={"norm": "linf", "eps": 0.03}) as (work, _):
        save(linear(precision="fp32", max_batch="64"), work)
    return tmp_path / "mine"


@without_gpu
def test_trt_without_a_device_is_4_and_gives_the_command(graph: Path, command: Command) -> None:
    code, out, err = command("export", graph, "--trt")
    assert (code, out) == (4, "") and len(err.splitlines()) == 3
    assert err.startswith("no TensorRT engine can be built here: ")
    assert "  fix: copy mine to the device and run there: robustkd export mine --trt --precision fp32" in err


@without_gpu
@pytest.mark.parametrize("target", ["jetson-orin-fp16", "jetson-orin-int8", "datacenter-fp16"])
def test_a_target_of_another_machine_is_4(target: str, graph: Path, command: Command) -> None:
    code, _, err = command("export", graph, "--target", target)
    assert code == 4 and "run there: robustkd export mine" in err


def test_gpus_are_for_rtx(graph: Path, command: Command) -> None:
    code, _, err = command("export", graph, "--trt", "--target", "sm86")
    assert code == 2 and "GPUs are named for --rtx" in err


@pytest.mark.rtx
@with_rtx
def test_an_rtx_engine_in_the_graphs_own_precision(graph: Path, command: Command, tmp_path: Path) -> None:
    code, out, _ = command("export", graph, "--rtx", "--target", "sm86,sm89", "--batch", "1:2:4", "--json")
    assert code == 0
    told = json.loads(out)["targets"]["rtx-fp32"]
    bundle = Bundle.open(Path(told["bundle"]), kind="engine")
    assert told["precision"] == "fp32" and told["engine"]["capabilities"] == ["sm86", "sm89"]
    assert told["engine"]["batch"] == [1, 2, 4] and bundle.manifest.parent == Bundle.open(graph).digest
    assert bundle.manifest.threat is not None and bundle.manifest.threat.eps == 0.03
    assert command("verify", bundle.path).code == 0
    if not probe().gpus:
        assert (told["engine"]["verified"], told["engine"]["reason"]) == (False, "no device")


@pytest.mark.rtx
@with_rtx
def test_a_board_has_no_torch(graph: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'accelerate', 'onnxscript'):\n    sys.modules[name] = None\n"
        "from robustkd.cli.app import run\n"
        f"sys.exit(run(['export', {str(graph)!r}, '--rtx']))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Bundle.open(graph.parent / "rtx-fp32", kind="engine").manifest.precision == "fp32"


@pytest.mark.rtx
@with_rtx
@without_gpu
def test_the_command_says_that_nothing_was_run(graph: Path, command: Command) -> None:
    code, out, _ = command("export", graph, "--rtx", "--precision", "fp16")
    assert code == 0 and "not verified: no device" in out


@pytest.mark.rtx
@with_rtx
@pytest.mark.parametrize("gpus", ["sm87", "sm86,sm999"])
def test_gpus_that_this_version_does_not_know_are_refused_before_any_work(gpus: str, graph: Path, command: Command) -> None:
    code, out, err = command("export", graph, "--rtx", "--target", gpus)
    assert (code, out) == (4, "") and "it knows sm75, sm80, sm86" in err
    assert [folder.name for folder in graph.parent.iterdir() if folder.is_dir()] == ["mine"]


@pytest.mark.rtx
@with_rtx
def test_the_graph_inside_an_engine_bundle_can_be_audited_anywhere(graph: Path, command: Command) -> None:
    from robustkd.auditing.artifact import open_subject

    code, out, _ = command("export", graph, "--rtx", "--json")
    assert code == 0
    twin = Path(json.loads(out)["targets"]["rtx-fp32"]["bundle"]) / "model.onnx"
    subject = open_subject(twin)
    assert subject.facts.path == str(twin) and subject.home.name == "audit-onnx"
    assert subject.engine((2, 5, 5)).logits(images(3)).shape == (3, 4)
