"""`robustkd export` through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from robustkd.bundle import Bundle, sha256
from tests.checkpoints import write_checkpoint
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run under ./runs of the folder the commands work in."""
    return write_checkpoint(tmp_path / "runs" / "mine" / "checkpoint").path.parent


def test_bare_export_takes_the_newest_checkpoint_and_json_is_all_of_stdout(cli: Command, run: Path) -> None:
    code, out, err = cli("export", "--batch", "1:4:32", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["checkpoint"] == "runs/mine/checkpoint"
    assert err == "checkpoint: runs/mine/checkpoint (the newest one)\n"
    facts = told["targets"]["cpu-fp32"]
    bundle = Bundle.open(run / "cpu-fp32", kind="onnx")
    assert facts["bundle"] == str(bundle.path) and facts["sha256"] == sha256(Path(facts["file"]))
    assert (facts["precision"], facts["parity"]["ok"], facts["parity"]["batches"]) == ("fp32", True, [1, 4, 32, 256])
    assert (bundle.manifest.model_extra or {})["target"]["batch"] == [1, 4, 32]


def test_named_checkpoint_target_and_output(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("extends: cpu-fp32\nopset: 18\n")
    code, out, err = command("export", run, "--target", "small.yaml", "--output", "out")
    assert (code, err) == (0, f"checkpoint: {run / 'checkpoint'}\n")
    first, second, third = out.splitlines()
    assert first.startswith("small: out/small/model.onnx (") and first.endswith(" MB)")
    assert second.startswith("  export: same class as source on 100.00% of 256 test images; largest logit difference ")
    assert third.startswith("  importer: same class as runtime on 100.00% of 256 test images; largest logit difference ")
    assert (tmp_path / "out" / "small" / "model.onnx").is_file()
    code, _, err = command("export", run, "--target", "small.yaml", "--output", "out")
    assert code == 5 and "there is something here already" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--target", "jetson-orin-fp61"], 3, "did you mean jetson-orin-fp16?"),
        (["--onnx", "--set", "opset=99"], 3, "at: --set opset=99"),
        (["--trt", "--precision", "int8", "--int8-profile", "ort-cpu"], 3, "no TensorRT reads it"),
        (["--keep-fp32", "layer1.0.conv1"], 2, "add --precision fp16 or int8"),
        (["--calib-n", "64"], 2, "add --precision int8"),
        (["--onnx", "--int8-profile", "ort-cpu"], 2, "add --precision int8"),
        (["--onnx", "--target", "sm86"], 2, "GPUs are named for --rtx"),
        (["--onnx", "--target", "cpu-int8", "--int8-profile", "trt"], 2, "--int8-profile"),
        (["--target", "cpu-fp32", "--precision", "fp32"], 2, "--precision"),
        (["--precision", "fp8"], 2, "fp8"),
        (["--batch", "8"], 2, "'8' is not MIN:OPT:MAX"),
        (["--batch", "8:1:64"], 2, "is not MIN:OPT:MAX"),
        (["--batch", "0:1:64"], 2, "is not MIN:OPT:MAX"),
        (["--batch", "1:x:64"], 2, "is not MIN:OPT:MAX"),
    ],
)
def test_what_is_refused_is_refused_at_once(arguments: list[str], code: int, says: str, command: Command, run: Path) -> None:
    outcome = command("export", run, *arguments)
    assert (outcome.code, outcome.stdout) == (code, "")
    assert says in outcome.stderr
    assert [p.name for p in run.iterdir()] == ["checkpoint"]


def test_no_checkpoint_anywhere(command: Command, tmp_path: Path) -> None:
    code, out, err = command("export")
    assert (code, out) == (5, "")
    assert err.splitlines() == [
        "there is no checkpoint here",
        f"  at: {tmp_path / 'runs'}",
        "  fix: run `robustkd distill` first, or name a checkpoint",
    ]


def test_a_flipped_byte_in_the_checkpoint(command: Command, run: Path) -> None:
    file = run / "checkpoint" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, err = command("export", run)
    assert (code, out) == (5, "") and "its digest differs" in err


def test_output_that_cannot_be_written(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    code, _, err = command("export", run, "--output", "taken")
    assert code == 5 and "cannot write here" in err


def test_a_gate_that_could_not_be_held_is_told() -> None:
    from robustkd.cli.export import _lines

    told = _lines({"gates": {"runtime-importer": {"skipped": "operator NonZero is not covered"}}})
    assert told == ["runtime-importer: skipped, operator NonZero is not covered"]
