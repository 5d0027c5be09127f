"""Where an audit runs: an .onnx file in torch instead of ONNX Runtime, a device by name, batches of another size."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustkd.auditing.artifact import open_subject, reopen_placed
from robustkd.auditing.verb import audit
from robustkd.bundle import Bundle, ModelInfo, create
from robustkd.cli.app import run as command
from robustkd.engines.pytorch import chosen, full_products
from robustkd.errors import ArtifactError, ConfigError, RequirementError
from robustkd.exporting.verb import export
from robustkd.models._files import load_net, portable
from robustkd.threat import ThreatModel
from tests.audit_nets import images, trained

POLICY = (
    "noise_draws: 1\npgd_steps: 3\napgd_steps: 4\ntargets: 1\nsquare_queries: 10\n"
    "ladder_images: 0\nscale_images: 0\nmemory_images: 0\n"
)
STUDENT = {"name": "resnet18", "width": 0.05}
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained for a moment, its export in fp32, its data, and a policy of few steps."""
    from robustkd.catalog import Shelf

    root, data = tmp_path_factory.mktemp("run"), images(96)
    np.savez(root / "test.npz", x=data.images, y=data.labels)
    (root / "policy.yaml").write_text(f"{POLICY}fresh_process: false\n")
    (root / "fresh.yaml").write_text(POLICY)
    torch.manual_seed(0)
    net = trained(Shelf("models").get("resnet18")(**STUDENT).build(channels=1, classes=4), data, steps=20)
    recipe = {"student": STUDENT, "dataset": {"name": "npz", "test": str(root / "test.npz")}}
    told = ModelInfo(architecture="resnet18", classes=data.classes, input_shape=SHAPE)
    with create(root / "checkpoint", "checkpoint", recipe=recipe, model=told, threat=ThreatModel(eps=0.02)) as (folder, _):
        save_file(portable(net), folder / "model.safetensors")
    export(root / "checkpoint", targets=["cpu-fp32"], output=root)
    return root


def audited(home: Path, artifact: str, output: Path, policy: str = "policy", **options: object):
    result, _ = audit(home / artifact, n=24, policy=str(home / f"{policy}.yaml"), output=output, **options)
    return result


def test_a_file_runs_in_torch_and_is_judged_as_by_onnx_runtime(home: Path, tmp_path: Path) -> None:
    usual = audited(home, "cpu-fp32", tmp_path / "usual")
    torch_ = audited(home, "cpu-fp32", tmp_path / "torch", "fresh", runtime="onnx-torch")
    assert (usual.artifact.runtime, torch_.artifact.runtime) == ("onnxruntime", "onnx-torch")
    assert torch_.artifact.sha256 == usual.artifact.sha256
    assert torch_.engine.robust_accuracy == usual.engine.robust_accuracy
    fresh = next(check for check in torch_.checks if check.name.startswith("S18"))
    assert fresh.status == "ok" and "fresh process" in fresh.message


def test_a_finished_audit_through_another_runtime_is_another_audit(home: Path, tmp_path: Path) -> None:
    audited(home, "cpu-fp32", tmp_path / "audit", runtime="onnx-torch")
    again = audited(home, "cpu-fp32", tmp_path / "audit", runtime="onnx-torch", resume=True)
    assert again.artifact.runtime == "onnx-torch"
    with pytest.raises(ArtifactError, match="another audit"):
        audited(home, "cpu-fp32", tmp_path / "audit", runtime="onnxruntime", resume=True)


def test_the_size_of_a_batch_is_part_of_what_is_told(home: Path, tmp_path: Path) -> None:
    result = audited(home, "checkpoint", tmp_path / "audit", batch_size=7, device="auto")
    assert result.policy["bounds"]["batch_size"] == 7


def test_only_an_onnx_file_has_a_choice_of_runtime(home: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint"):
        open_subject(home / "checkpoint", runtime="onnx-torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("artifact", ["checkpoint", "cpu-fp32", "teacher:fashion-mnist-resnet18"])
def test_a_gpu_that_is_not_here_is_told(home: Path, artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = artifact if ":" in artifact else str(home / artifact)
    assert command(["audit", name, "--device", "cuda", "--n", "8", "--output", str(tmp_path / "audit")]) == 4
    assert "sees no GPU" in capsys.readouterr().err


def test_auto_takes_what_is_here() -> None:
    assert chosen("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert chosen("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(RequirementError):
            chosen("cuda")


def test_tf32_is_as_it_was_afterwards() -> None:
    before = torch.backends.cudnn.allow_tf32
    with full_products():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_fresh_process_judges_without_tf32_to_its_end(home: Path) -> None:
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        reopen_placed(json.dumps([str(home / "checkpoint"), "cpu", None]), SHAPE)
        gc.collect()  # a context that nobody holds would give the flags back
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "mps"])
def test_a_device_that_does_not_exist_is_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert command(["audit", str(home / "checkpoint"), "--device", name, "--n", "8", "--output", str(tmp_path / "audit")]) == 3
    assert f"there is no device {name}" in capsys.readouterr().err


def test_the_command_takes_a_runtime(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = str(home / "policy.yaml")
    order = ["--runtime", "onnx-torch", "--batch-size", "16", "--n", "16", "--policy", policy, "--min-robust", "0"]
    code = command(["audit", str(home / "cpu-fp32"), *order, "--output", str(tmp_path / "audit"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code in (0, 10, 11, 12)
    assert told["artifact"]["runtime"] == "onnx-torch"
    assert Bundle.open(tmp_path / "audit", kind="audit").manifest.kind == "audit"


def test_a_network_keeps_its_device(home: Path) -> None:
    net = load_net(Bundle.open(home / "checkpoint", kind="checkpoint"))
    engine = open_subject(home / "checkpoint", device="cpu").engine(SHAPE)
    x = images(8).floats()
    np.testing.assert_allclose(engine.logits(x), net(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
