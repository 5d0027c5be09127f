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
    assert (bundle.manifest.model_extra or {})["target"]["max_batch"] == 32


def test_named_checkpoint_target_and_output(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("extends: cpu-fp32\nopset: 18\n")
    code, out, err = command("export", run, "--target", "small.yaml", "--output", "out")
    assert (code, err) == (0, f"checkpoint: {run / 'checkpoint'}\n")
    assert out.startswith("small: out/small/model.onnx\n  same class on 100.00% of 256 test images; largest logit difference ")
    assert (tmp_path / "out" / "small" / "model.onnx").is_file()
    code, _, err = command("export", run, "--target", "small.yaml", "--output", "out")
    assert code == 5 and "there is something here already" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--trt"], 4, "exports ONNX in fp32 only; trt-fp16 asks for trt in fp16"),
        (["--rtx"], 4, "rtx-fp16 asks for rtx in fp16"),
        (["--precision", "int8"], 4, "onnx-int8 asks for onnx in int8"),
        (["--onnx", "--trt", "--precision", "fp32"], 4, "trt-fp32 asks for trt in fp32"),
        (["--target", "jetson-orin-fp16"], 3, "jetson-orin-fp16 is not a shipped target"),
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
