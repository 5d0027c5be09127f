"""The verb and the command on real bundles: options, sources, refusals, exit codes, signals."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkd.auditing.store import partial_folder
from robustkd.auditing.verb import audit
from robustkd.bundle import Bundle, ModelInfo, create
from robustkd.catalog import Shelf
from robustkd.cli.app import run as command
from robustkd.errors import ArtifactError, ConfigError, Interrupted
from robustkd.models._files import load_net, portable
from robustkd.threat import ThreatModel
from tests.audit_nets import images

STUDENT = {"name": "resnet18", "width": 0.05}
TINY = (
    "noise_draws: 2\npgd_steps: 3\napgd_steps: 4\ntargets: 1\nsquare_queries: 10\n"
    "ladder_images: 4\nscale_images: 4\nmemory_images: 4\n"
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "tiny.yaml"
    file.write_text(TINY + "fresh_process: false\n")
    return str(file)


@pytest.fixture(scope="module")
def home(tmp_path_factory, policy):
    """A run: data, a checkpoint trained for a moment, and its export."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("run")
    data = images(96, size=32)
    np.savez(root / "data.npz", x=data.images, y=data.labels)
    config = Shelf("models").get("resnet18").model_validate(STUDENT)
    torch.manual_seed(0)
    net = config.build(channels=1, classes=4)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5  # so that a few steps are enough for the running statistics
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    recipe = {
        "student": config.model_dump(),
        "dataset": {"name": "npz", "test": [str(root / "data.npz")]},
        "audit": {"policy": policy, "n": 24, "tolerance": 20.0, "batch_size": 16},
    }
    info = ModelInfo(architecture="resnet18", classes=("a", "b", "c", "d"), input_shape=(1, 32, 32))
    facts = {"recipe": recipe, "model": info, "threat": ThreatModel(eps=4 / 255)}
    with create(root / "checkpoint", "checkpoint", **facts) as (work, _):
        save_file(portable(net), work / "model.safetensors")
    checkpoint = Bundle.open(root / "checkpoint")
    with create(root / "cpu-fp32", "onnx", parent=checkpoint) as (work, _):
        _to_onnx(load_net(checkpoint), work / "model.onnx")
    return root


def _to_onnx(net, file):
    program = torch.onnx.export(
        net,
        (torch.rand(2, 1, 32, 32),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=18,
        verbose=False,
    )
    program.save(str(file), external_data=False)


def test_a_bundle_says_everything_itself(home, tmp_path):
    said = []
    (tmp_path / "tiny.yaml").write_text(TINY)
    own = str(tmp_path / "tiny.yaml")  # the tests below leave out the fresh process, which costs seconds
    result, folder = audit(home / "cpu-fp32", output=tmp_path / "audit", policy=own, tolerance=20, progress=said.append)
    assert folder == tmp_path / "audit"
    assert result.dataset.n == 24 and result.threat.eps == 4 / 255 and result.policy["name"] == "tiny"
    assert result.source is not None and result.artifact.runtime == "onnxruntime"
    assert {a.level for a in result.engine.attacks.values()} == {"baseline", "surrogate", "replay", "blackbox"}
    assert result.verdict.status == "pass", result.verdict.reasons
    assert not [c for c in result.checks if c.status == "block"], result.checks
    assert result.latency is not None and [t.batch for t in result.latency.timings] == [1, 32]
    assert result.artifact.size == (home / "cpu-fp32" / "model.onnx").stat().st_size
    assert "fresh process" in next(c.message for c in result.checks if c.name.startswith("S18"))
    bundle = Bundle.open(folder, kind="audit")
    assert bundle.manifest.parent == Bundle.open(home / "cpu-fp32").digest
    assert any(line.startswith("pgd: ") for line in said)
    assert not partial_folder(folder).exists()


def test_the_default_place_and_a_finished_audit(home):
    result, folder = audit(home / "cpu-fp32", n=8)
    assert folder == home / "cpu-fp32" / "audit"
    with pytest.raises(ArtifactError, match="finished audit"):
        audit(home / "cpu-fp32", n=8)
    again, _ = audit(home / "cpu-fp32", n=8, resume=True)
    assert again == result
    with pytest.raises(ArtifactError, match="another audit"):
        audit(home / "cpu-fp32", n=8, eps="2/255", resume=True)
    Bundle.open(home / "cpu-fp32").verify()


def test_a_checkpoint_is_attacked_white_box(home, tmp_path):
    result, _ = audit(home / "checkpoint", output=tmp_path / "audit", min_clean=20)
    assert result.artifact.runtime == "pytorch" and result.source is None
    assert {a.level for a in result.engine.attacks.values()} == {"baseline", "surrogate", "blackbox"}
    assert result.verdict.status == "pass", result.verdict.reasons


def bare(home, tmp_path):
    file = tmp_path / "net.onnx"
    file.write_bytes((home / "cpu-fp32" / "model.onnx").read_bytes())
    return file


def test_a_bare_file_needs_data_and_eps(home, tmp_path, policy):
    file = bare(home, tmp_path)
    with pytest.raises(ConfigError) as caught:
        audit(file, dataset=str(home / "data.npz"))
    assert "--eps 8/255" in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        audit(file, eps="8/255")
    assert "--dataset" in caught.value.fix
    result, folder = audit(file, dataset=str(home / "data.npz"), eps="4/255", n=12, policy=policy)
    assert folder == tmp_path / "net-audit" and result.source is None and result.verdict.status == "inconclusive"
    assert {check.name: check.status for check in result.checks}["twin agreement"] == "ok"  # attacked through its own graph
    assert set(result.engine.attacks) == {"noise", "pgd", "apgd-ce", "apgd-t", "square", "uint8-post"}


def test_a_bare_file_with_a_source(home, tmp_path, policy):
    file = bare(home, tmp_path)
    result, _ = audit(
        file, dataset=str(home / "data.npz"), eps="4/255", n=12, policy=policy, source=home / "checkpoint", tolerance=40
    )
    assert result.difference is not None and result.verdict.status == "pass"


def test_a_bundle_is_audited_without_its_source_where_that_is_asked_for(home, tmp_path):
    said = []
    result, _ = audit(home / "cpu-fp32", source="none", min_clean=1, n=8, output=tmp_path / "alone", progress=said.append)
    assert result.source is None and result.source_model is None and result.difference is None
    assert any("held against no source" in line for line in said)


def test_a_moved_bundle_says_that_its_source_is_missing(home, tmp_path):
    import shutil

    shutil.copytree(home / "cpu-fp32", tmp_path / "moved", ignore=shutil.ignore_patterns("audit"))
    said = []
    result, _ = audit(tmp_path / "moved", n=8, progress=said.append)
    assert result.source is None and any("give --source" in line for line in said)
    shutil.copytree(home / "checkpoint", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "manifest.json"
    said.clear()
    assert file.is_file()
    result, _ = audit(tmp_path / "moved", n=8, output=tmp_path / "second", progress=said.append)
    assert result.source is not None


WRONG = {
    "nothing.onnx": "no such file",
    "weights.safetensors": "bare weights",
    "x.onnx": "x.onnx",
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_nothing(tmp_path, name):
    if name != "nothing.onnx":
        (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=WRONG[name]):
        audit(tmp_path / name, dataset="fashion-mnist-10k", eps="8/255")


def test_wrong_values_are_config_errors(home, tmp_path):
    for options in ({"eps": "eight"}, {"norm": "l7"}, {"policy": "quickly"}, {"tolerance": 300.0}):
        with pytest.raises(ConfigError):
            audit(home / "cpu-fp32", output=tmp_path / "audit", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_the_rest_is_done_later(home, tmp_path, signum):
    def stop(line):
        if line.startswith("pgd"):
            signal.raise_signal(signum)

    with pytest.raises(Interrupted) as caught:
        audit(home / "cpu-fp32", output=tmp_path / "audit", progress=stop)
    assert caught.value.signum == signum
    assert not (tmp_path / "audit").exists() and list(partial_folder(tmp_path / "audit").glob("pgd-*"))
    result, _ = audit(home / "cpu-fp32", output=tmp_path / "audit", resume=True)
    whole, _ = audit(home / "cpu-fp32", output=tmp_path / "whole")
    assert result.engine.robust_accuracy == whole.engine.robust_accuracy and result.checks == whole.checks


def call(capsys, *words):
    code = command(["audit", *map(str, words)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_the_command_prints_one_json_object(home, tmp_path, capsys):
    code, out, err = call(capsys, home / "cpu-fp32", "--json", "--output", tmp_path / "audit", "--n", 12, "--tolerance", 50)
    found = json.loads(out)
    assert code == 0 and found["verdict"]["status"] == "pass" and found["schema"] == "robustkd.audit/1"
    assert "pgd: 12 of 12" in err or "pgd:" in err
    assert found == json.loads((tmp_path / "audit" / "result.json").read_text())


CODES = [
    (["--tolerance", "50"], 0, "verdict: pass"),
    (["--min-robust", "100"], 10, "verdict: fail"),
    (["--tolerance", "0.1"], 11, "verdict: inconclusive"),
    (["--eps", "seven"], 3, ""),
    (["--dataset", "nothing-like-it"], 3, ""),
    (["--n", "0"], 2, ""),
]


@pytest.mark.parametrize(("options", "code", "said"), CODES)
def test_exit_codes(home, tmp_path, capsys, options, code, said):
    found, out, err = call(
        capsys, home / "cpu-fp32", "--output", tmp_path / "audit", *(["--n", "24"] if "--n" not in options else []), *options
    )
    assert found == code, (out, err)
    assert said in out
    assert code in (0, 10, 11) or ("fix:" in err and not Path(tmp_path / "audit").exists())


def test_a_signal_through_the_command_says_how_to_resume(home, tmp_path, capsys, monkeypatch):
    from robustkd.attacks.pgd import PGD

    original = PGD._search

    def raising(self, *args):
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(PGD, "_search", raising)
    code, out, err = call(capsys, home / "cpu-fp32", "--output", tmp_path / "audit")
    assert code == 143 and out == "" and "--resume" in err
