"""Kits: what a device is told is what the workstation saw, without torch, and replay alone never passes int8."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from robustkd.auditing.facts import ArtifactFacts, SourceModel
from robustkd.auditing.kit import check_place, read_kit, save_kit
from robustkd.auditing.on_device import audit_kit
from robustkd.auditing.run import Order, carry_out
from robustkd.bundle import sha256
from robustkd.cli.app import run as command
from robustkd.engines._open import open_engine
from robustkd.errors import ArtifactError, NumericsError
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_nets import images
from tests.unit.onnx_graphs import finish

ROOT = Path(__file__).parents[2]
POLICY = Policy(
    name="test",
    noise_draws=2,
    pgd_steps=3,
    apgd_steps=8,
    targets=2,
    square_queries=20,
    ladder_images=0,
    scale_images=0,
    memory_images=0,
    fresh_process=False,
)


class Linear(torch.nn.Module):
    """Brightness of each quadrant against the rest."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(weight))

    def forward(self, x):
        return x.flatten(1) @ self.weight


def weights():
    corners = np.full((4, 8, 8), -1.0, np.float32)
    for i, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        corners[i, top : top + 4, left : left + 4] = 3.0
    return corners.reshape(4, 64).T.copy()


def graph(kind: str, weight=None) -> onnx.ModelProto:
    """The net as an engine: fp32, or int8 with so coarse a scale that its answers change."""
    weight = weights() if weight is None else weight
    tensors = [numpy_helper.from_array(weight, "w")]
    nodes = [helper.make_node("Flatten", ["images"], ["flat"])]
    inner = "flat"
    if kind == "int8":
        tensors += [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
        nodes.append(helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]))
        inner = "dq"
    nodes.append(helper.make_node("MatMul", [inner, "w"], ["logits"]))
    return finish(nodes, ["n", 1, 8, 8], TensorProto.FLOAT, tensors)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two engines of one net, the audit of the fp32 one with its source, and the kit of that audit."""
    folder = tmp_path_factory.mktemp("kit")
    for kind in ("fp32", "int8"):
        onnx.save(graph(kind), str(folder / f"{kind}.onnx"))
    source = SourceModel(Linear(weights()), "source", "sha256:1")
    file = folder / "fp32.onnx"
    with open_engine(file) as engine:
        order = Order(
            engine,
            ArtifactFacts(str(file), sha256(file)),
            images(60),
            ThreatModel(eps=0.05),
            POLICY,
            AuditConfig(tolerance=10, batch_size=25),
            source=source,
        )
        result, arrays = carry_out(order)
    save_kit(folder / "kit.npz", result, arrays)
    return folder, result, arrays


def test_the_same_flags_as_on_the_workstation(home, tmp_path):
    import pyarrow.parquet as pq

    folder, result, arrays = home
    on_device, place = audit_kit(folder / "fp32.onnx", folder / "kit.npz", output=tmp_path / "audit")
    rows = pq.read_table(place / "records.parquet").to_pydict()
    engine = arrays.ledger.engine
    assert {n for n in engine.attacks if n.startswith("replay:")} and set(engine.attacks) == set(on_device.engine.attacks)
    for name, judged in engine.attacks.items():
        tried = engine.tried(name)
        assert [flag is not None for flag in rows[f"{name}:robust"]] == tried.tolist()
        mine = np.asarray([bool(flag) for flag in rows[f"{name}:robust"]])
        assert np.array_equal(mine[tried], judged.robust[tried])
    assert rows["robust"] == engine.robust().tolist()
    assert rows["source:robust"] == arrays.ledger.source.robust().tolist()
    assert on_device.engine.robust_accuracy == result.engine.robust_accuracy
    assert on_device.source_model.robust_accuracy == result.source_model.robust_accuracy
    assert on_device.difference == result.difference
    assert {a.level for a in on_device.engine.attacks.values()} == {"baseline", "replay"}
    assert on_device.kit.made_on == result.artifact.sha256 and on_device.kit.sha256 == sha256(folder / "kit.npz")


def test_an_engine_of_the_same_function_may_pass(home, tmp_path):
    folder, _, _ = home
    result, _ = audit_kit(folder / "fp32.onnx", folder / "kit.npz", output=tmp_path / "audit")
    assert result.verdict.status == "pass", result.verdict.reasons
    assert next(c for c in result.checks if c.name.startswith("kit")).status == "ok"
    result, _ = audit_kit(folder / "fp32.onnx", folder / "kit.npz", output=tmp_path / "strict", min_robust=99.9)
    assert result.verdict.status == "fail"


def test_replay_alone_never_passes_a_quantised_engine(home, tmp_path):
    """Neither by its drop nor by a floor, however generous; a floor it misses is still proved."""
    folder, _, _ = home
    options = {"kit": folder / "kit.npz", "tolerance": 100.0}
    result, _ = audit_kit(folder / "int8.onnx", output=tmp_path / "a", min_robust=0.1, **options)
    assert result.artifact.precision == "int8" and result.verdict.status == "inconclusive"
    assert any("without access to this engine" in reason for reason in result.verdict.reasons)
    assert result.engine.robust_accuracy.low > 0.001
    result, _ = audit_kit(folder / "int8.onnx", output=tmp_path / "b", min_robust=99.9, **options)
    assert result.verdict.status == "fail"


def test_nor_one_that_only_says_it_is_fp32(home, tmp_path):
    folder, _, _ = home
    model = graph("int8")
    model.metadata_props.add(key="robustkd.precision", value="fp32")
    onnx.save(model, str(tmp_path / "lying.onnx"))
    result, _ = audit_kit(tmp_path / "lying.onnx", folder / "kit.npz", tolerance=100.0)
    assert result.artifact.precision == "fp32" and result.verdict.status == "inconclusive"


def test_an_engine_of_another_model(home, tmp_path):
    folder, _, _ = home
    onnx.save(graph("fp32", weights()[:, ::-1].copy()), str(tmp_path / "permuted.onnx"))
    with pytest.raises(NumericsError, match="parity"):
        audit_kit(tmp_path / "permuted.onnx", folder / "kit.npz")
    weight = np.zeros((64, 3), np.float32)
    onnx.save(graph("fp32", weight), str(tmp_path / "three.onnx"))
    with pytest.raises(ArtifactError, match="3 classes"):
        audit_kit(tmp_path / "three.onnx", folder / "kit.npz")


NO_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "pyautoattack", "onnxscript"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
from robustkd.cli.app import run
code = run(sys.argv[1:])
assert not any(name.partition(".")[0] == "torch" for name in sys.modules), "torch"
sys.exit(code)
"""


def test_the_device_needs_no_torch(home, tmp_path):
    folder, result, _ = home
    words = ["audit", folder / "fp32.onnx", "--kit", folder / "kit.npz", "--output", tmp_path / "audit", "--json"]
    words += ["--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md"]
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine"]["robust_accuracy"]["estimate"] == result.engine.robust_accuracy.estimate
    assert found["verdict"]["status"] == "pass" and found["kit"]["made_on"] == result.artifact.sha256
    assert "<testsuite" in (tmp_path / "j.xml").read_text() and "**Pass**" in (tmp_path / "s.md").read_text()
    assert command(["verify", str(tmp_path / "audit")]) == 0


def call(capsys, *words):
    code = command([*map(str, words)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_what_a_kit_settles_is_refused(home, tmp_path, capsys):
    folder, _, _ = home
    words = ["audit", folder / "fp32.onnx", "--kit", folder / "kit.npz", "--output", tmp_path / "audit"]
    code, _, err = call(capsys, *words, "--eps", "8/255", "--n", 5)
    assert code == 3 and "--eps" in err and "--n" in err
    code, _, err = call(capsys, *words[:3], tmp_path / "no.npz")
    assert code == 5 and "no such kit" in err


def rewritten(file, to, change):
    """The kit with one array changed, so that every checksum of the zip is right again."""
    with np.load(file) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez_compressed(to, **arrays)
    return to


def _flip(arrays):
    arrays["y"][0] = (arrays["y"][0] + 1) % 4


def _lie(arrays):
    arrays["told"] = np.asarray(str(arrays["told"]).replace('"eps":0.05', '"eps":0.0005'))


def _foreign(arrays):
    arrays["told"] = np.asarray("{}")


def _pickled(arrays):
    arrays["extra"] = np.asarray([{"a": 1}], dtype=object)


@pytest.mark.parametrize("change", [_flip, _lie, _foreign, _pickled, lambda arrays: arrays.pop("digest")])
def test_a_changed_kit_is_refused(home, tmp_path, change):
    folder, _, _ = home
    file = rewritten(folder / "kit.npz", tmp_path / "kit.npz", change)
    with pytest.raises(ArtifactError, match="kit"):
        read_kit(file)


@pytest.mark.parametrize("cut", [0, 10, 2000, -1, -300])
def test_a_cut_kit_is_refused(home, tmp_path, cut, capsys):
    folder, _, _ = home
    (tmp_path / "kit.npz").write_bytes((folder / "kit.npz").read_bytes()[:cut])
    code, _, err = call(capsys, "audit", folder / "fp32.onnx", "--kit", tmp_path / "kit.npz", "--output", tmp_path / "a")
    assert code == 5 and "damaged" in err


def test_flipped_bytes_are_refused_or_change_nothing(home, tmp_path):
    """Zip headers hold a few bytes without meaning (times, attributes); everything that is read is covered."""
    folder, _, _ = home
    whole = (folder / "kit.npz").read_bytes()
    reference = read_kit(folder / "kit.npz")
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(whole), 60, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "kit.npz").write_bytes(bytes(damaged))
        try:
            read = read_kit(tmp_path / "kit.npz")
        except ArtifactError:
            refused += 1
        else:
            assert read.digest == reference.digest and np.array_equal(read.x, reference.x)
    assert refused > 40


def test_eight_bit_images_come_back_to_the_bit(home):
    folder, _, arrays = home
    kit = read_kit(folder / "kit.npz")
    with np.load(folder / "kit.npz") as archive:
        assert archive["x"].dtype == np.uint8
    assert kit.x.dtype == np.float32 and np.array_equal(kit.x, arrays.x)


def test_places_that_take_no_kit(tmp_path):
    for name, said in (("kit.zip", "end it with"), ("no/kit.npz", "mkdir")):
        with pytest.raises(ArtifactError) as caught:
            check_place(tmp_path / name)
        assert said in caught.value.fix
    (tmp_path / "kit.npz").write_bytes(b"")
    with pytest.raises(ArtifactError, match="already"):
        check_place(tmp_path / "kit.npz")


def test_an_audit_saves_its_kit_through_the_command(home, tmp_path, capsys):
    folder, _, _ = home
    data = images(80)
    np.savez(tmp_path / "data.npz", x=data.images, y=data.labels)
    (tmp_path / "p.yaml").write_text(
        "noise_draws: 2\npgd_steps: 2\napgd_steps: 0\nsquare_queries: 5\nfresh_process: false\nladder_images: 0\n"
    )
    words = ["audit", folder / "fp32.onnx", "--dataset", tmp_path / "data.npz", "--eps", "0.05", "--n", 40]
    words += ["--policy", tmp_path / "p.yaml", "--output", tmp_path / "a", "--save-kit", tmp_path / "kit.npz", "--json"]
    code, out, err = call(capsys, *words)
    assert code == 11 and "sha256:" in err, err
    code, _, err = call(capsys, *words, "--resume")
    assert code == 5 and "a file here already" in err
    code, again, err = call(
        capsys, "audit", folder / "fp32.onnx", "--kit", tmp_path / "kit.npz", "-o", tmp_path / "b", "--json"
    )
    assert code == 11, err
    first, second = json.loads(out), json.loads(again)
    assert first["engine"]["robust_accuracy"] == second["engine"]["robust_accuracy"] and second["source"] is None
