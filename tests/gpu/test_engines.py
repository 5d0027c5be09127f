"""Exported files on the device through the importer, against ONNX Runtime on the CPU; and an audit of one there."""

from pathlib import Path

import numpy as np
import pytest

from robustkd.auditing.verb import audit
from robustkd.engines.onnx_torch import OnnxTorchEngine
from robustkd.engines.ort import OrtEngine
from robustkd.exporting.verb import export
from robustkd.recipe.target import read_target
from tests.checkpoints import write_checkpoint

SHAPE = (1, 28, 28)
SLACK = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.02}
"""Of the largest logit; int8 by the mean over logits, for a value between two levels may be rounded to either."""
POLICY = (
    "noise_draws: 1\npgd_steps: 3\napgd_steps: 4\ntargets: 1\ntwins: 2\nsquare_queries: 10\n"
    "ladder_images: 0\nscale_images: 0\nmemory_images: 0\nfresh_process: {fresh}\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle for each precision, beside the checkpoint they were made from."""
    root = tmp_path_factory.mktemp("run")
    write_checkpoint(root / "checkpoint")
    half = root / "cpu-fp16.yaml"
    half.write_text("kind: onnx\nprecision: fp16\n")
    calibration = "calibration: {n: 32}"
    int8 = root / "trt-int8.yaml"
    int8.write_text(f"kind: onnx\nprecision: int8\nint8_profile: trt\n{calibration}\n")
    targets = {"fp32": "cpu-fp32", "fp16": str(half), "int8": str(int8)}
    for target in targets.values():
        export(root / "checkpoint", targets=[target], output=root)
    return {precision: root / read_target(target).name for precision, target in targets.items()}


@pytest.mark.parametrize("precision", SLACK)
def test_the_importer_answers_as_onnx_runtime(precision: str, files: dict[str, Path], device: str) -> None:
    file = files[precision] / "model.onnx"
    x = np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)
    with OrtEngine(file, threads=1, optimize=False) as runtime:
        wanted = runtime.logits(x)
    engine = OnnxTorchEngine(file, device=device)
    got = engine.logits(x)
    assert engine.info.precision == precision
    assert engine.info.device == "cpu" or device == "cuda"
    gap = np.abs(got - wanted)
    unit = float(np.abs(wanted).max())
    assert float(gap.mean() if precision == "int8" else gap.max()) <= SLACK[precision] * unit
    near = np.sort(wanted)[:, -1] - np.sort(wanted)[:, -2] < 2 * gap.max()
    assert (got.argmax(1) == wanted.argmax(1))[~near].all()


@pytest.mark.parametrize("artifact", ["checkpoint", "int8"])
def test_an_audit_on_the_device(artifact: str, files: dict[str, Path], device: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(fresh=str(device == "cuda").lower()))
    path = files.get(artifact, files["fp32"].parent / artifact)
    result, _ = audit(
        path,
        n=24,
        policy=str(policy),
        device=device,
        runtime=None if artifact == "checkpoint" else "onnx-torch",
        output=tmp_path / "audit",
    )
    assert {"cpu": result.artifact.device == "cpu", "cuda": result.artifact.device != "cpu"}[device]
    assert result.artifact.runtime == ("pytorch" if artifact == "checkpoint" else "onnx-torch")
    assert {"apgd-ce", "apgd-t"} <= set(result.engine.attacks)
    assert result.engine.robust_accuracy.estimate <= result.engine.clean_accuracy.estimate
    broken = [check for check in result.checks if check.status == "block" and not check.name.startswith(("S5", "S17"))]
    assert not broken, broken
