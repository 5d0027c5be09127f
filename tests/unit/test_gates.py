"""The gates between steps of an export: each planted fault must be caught, and figures and tolerances be in the manifest."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from robustkd.bundle import Bundle
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import ArtifactError, ConfigError, NumericsError
from robustkd.exporting import run as exporting
from robustkd.exporting.calibration import calibration_images
from robustkd.exporting.graphs import inferred
from robustkd.exporting.half import to_half
from robustkd.exporting.held import hold
from robustkd.exporting.int8 import full_ranges, quantize, tensors
from robustkd.exporting.parity import GATES, Gate, check, compare
from robustkd.exporting.ranges import measure
from robustkd.exporting.verb import export, parity_images
from robustkd.recipe.target import Calibration, Target
from tests.checkpoints import write_checkpoint
from tests.nets import SmallNet
from tests.unit.quant_graphs import array, replace

CALIBRATION = Calibration(n=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "a" / "checkpoint")


@pytest.fixture(scope="module")
def built(checkpoint: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One bundle per precision and profile, from one checkpoint."""
    targets = [
        Target(name="half", precision="fp16"),
        Target(name="both", precision="int8-fp16", calibration=CALIBRATION),
        Target(name="cpu", precision="int8", int8_profile="ort-cpu", calibration=CALIBRATION, batch=(1, 4, 8)),
    ]
    made = export(checkpoint.path, targets=targets, output=tmp_path_factory.mktemp("out"))
    return dict(zip(("half", "both", "cpu"), made, strict=True))


def _extra(bundle: Bundle) -> dict[str, Any]:
    return bundle.manifest.model_extra or {}


class TestBundles:
    def test_each_is_of_its_precision_and_smaller(self, built: dict[str, Bundle]) -> None:
        sizes = {name: bundle.file(".onnx").stat().st_size for name, bundle in built.items()}
        assert max(sizes["both"], sizes["cpu"]) < sizes["half"]
        told = {"half": "fp16", "both": "int8-fp16", "cpu": "int8"}
        for name, precision in told.items():
            with OrtEngine(built[name].file(".onnx")) as engine:
                assert built[name].manifest.precision == engine.info.precision == precision
                assert engine.info.settings["graph_optimization"] == "all" and engine.info.settings["provider"]

    @pytest.mark.parametrize("name", ["half", "both", "cpu"])
    def test_figures_and_tolerances_of_every_gate(self, name: str, built: dict[str, Bundle]) -> None:
        extra, precision = _extra(built[name]), built[name].manifest.precision
        assert list(extra["gates"]) == ["source-export", f"fp32-{precision}", "runtime-importer"]
        assert extra["gates"]["runtime-importer"]["ok"]
        last = extra["gates"][f"fp32-{precision}"]
        assert extra["parity"] == last and last["ok"]
        gate, size = GATES[precision], last["tolerance"] / last["relative"]
        assert (last["relative"], last["min_agreement"]) == (gate.relative, gate.agreement)
        assert (last["mean_tolerance"], last["margin"]) == pytest.approx((gate.mean * size, gate.margin * size))
        assert last["mean_abs"] < last["mean_tolerance"] < last["tolerance"]
        assert 0 < last["max_abs"] <= last["tolerance"]
        assert last["batches"] == ([1, 4, 8, 256] if name == "cpu" else [1, 7, 256])
        assert json.loads((built[name].path / "parity.json").read_text())["gates"] == extra["gates"]

    def test_calibration_is_recorded(self, built: dict[str, Bundle]) -> None:
        lowering = _extra(built["half"])["lowering"]
        assert "calibration" not in _extra(built["half"]) and set(lowering) == {"kept", "held"}
        assert lowering["kept"] == [] and 0 < lowering["held"]["largest_error"] < 1
        extra = _extra(built["cpu"])
        told = json.loads((built["cpu"].path / "calibration.json").read_text())
        assert {key: told[key] for key in extra["calibration"]} == extra["calibration"]
        assert (told["n"], told["method"], told["seed"], told["attack"], told["split"]) == (32, "percentile", 0, None, "train")
        assert len(told["index_sha256"]) == 64 and told["profile"] == "ort-cpu"
        assert told["tensors"]["images"] == {"low": 0.0, "high": 1.0, "scale": pytest.approx(1 / 255), "zero_point": 0}
        assert all(t["low"] < t["high"] for t in told["tensors"].values())
        assert extra["lowering"]["held"]["scales"] == len(told["tensors"])
        assert len(told["sensitivity"]) == extra["lowering"]["layers"] and len(extra["lowering"]["sensitive"]) == 5

    def test_no_leftovers(self, built: dict[str, Bundle]) -> None:
        assert {f.name for f in built["both"].path.iterdir()} == {
            "model.onnx",
            "parity.json",
            "calibration.json",
            "manifest.json",
            "manifest.sha256",
        }


class TestCalibration:
    def test_the_choice_follows_the_seed(self, checkpoint: Bundle) -> None:
        one, two = (calibration_images(checkpoint, CALIBRATION) for _ in range(2))
        other = calibration_images(checkpoint, Calibration(n=32, seed=1))
        np.testing.assert_array_equal(one.images, two.images)
        assert one.record == two.record and one.record["index_sha256"] != other.record["index_sha256"]

    def test_attacked_images_are_in_the_ball_and_worse_for_the_network(self, checkpoint: Bundle) -> None:
        from robustkd.losses import cross_entropy

        net = exporting.source_engine(checkpoint).net
        clean = calibration_images(checkpoint, CALIBRATION)
        made = calibration_images(checkpoint, Calibration(n=32, attack=True), net=net)
        assert made.record["attack"] == {"name": "pgd", "steps": 10, "step": 0.25, "norm": "linf", "eps": 8 / 255}
        assert 0 < np.abs(made.images - clean.images).max() <= 8 / 255 + 1e-6
        assert made.images.min() >= 0 and made.images.max() <= 1

        from robustkd.datasets._base import balanced
        from robustkd.datasets._open import open_dataset

        data = open_dataset("fashion-mnist-10k").load("train")
        y = torch.from_numpy(data.labels[balanced(data.labels, 32, 0)])
        with torch.no_grad():
            loss = [float(cross_entropy(net.eval()(torch.from_numpy(x)), y).mean()) for x in (clean.images, made.images)]
        assert loss[1] > loss[0]

    def test_more_images_than_there_are(self, checkpoint: Bundle, tmp_path: Path) -> None:
        np.savez(tmp_path / "few.npz", x=np.zeros((3, 1, 28, 28), np.uint8), y=np.arange(3))
        assert calibration_images(checkpoint, Calibration(data=str(tmp_path / "few.npz"))).record["n"] == 3

    def test_images_of_another_shape_none_at_all_and_labels_unknown(self, checkpoint: Bundle, tmp_path: Path) -> None:
        np.savez(tmp_path / "colour.npz", x=np.zeros((4, 3, 32, 32), np.uint8), y=np.arange(4))
        with pytest.raises(ArtifactError, match="the model takes"):
            calibration_images(checkpoint, Calibration(data=str(tmp_path / "colour.npz")))
        np.savez(tmp_path / "none.npz", x=np.zeros((0, 1, 28, 28), np.uint8), y=np.zeros(0, np.int64))
        with pytest.raises(ArtifactError, match="no images"):
            calibration_images(checkpoint, Calibration(data=str(tmp_path / "none.npz")))
        np.savez(tmp_path / "more.npz", x=np.zeros((4, 1, 28, 28), np.uint8), y=np.array([1, 2, 3, 12]))
        with pytest.raises(ArtifactError, match="label 12, the model knows 10 classes"):
            calibration_images(checkpoint, Calibration(data=str(tmp_path / "more.npz"), attack=True))

    def test_an_attack_needs_a_threat_model(self, tmp_path: Path) -> None:
        bundle = write_checkpoint(tmp_path / "c", threat=None)
        with pytest.raises(ConfigError, match="does not say what it withstands"):
            calibration_images(bundle, Calibration(n=4, attack=True))


class Trained(NamedTuple):
    """A network whose classes depend on the image, its fp32 file, and images it was not trained on."""

    net: Any
    file: Path
    images: Any


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from robustkd.datasets._open import open_dataset
    from robustkd.exporting.to_onnx import to_onnx

    data = open_dataset("fashion-mnist-10k").load("train")
    x, y = torch.from_numpy(data.floats()[:2000]), torch.from_numpy(data.labels[:2000])
    torch.manual_seed(0)
    net = SmallNet(channels=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(3):
        for i in range(0, len(x), 50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[i : i + 50]), y[i : i + 50]).backward()
            optimizer.step()
    net.eval().seen.clear()
    file = tmp_path_factory.mktemp("trained") / "fp32.onnx"
    to_onnx(net, file, input_shape=(1, 28, 28), classes=list("0123456789"))
    return Trained(net, file, data.floats()[2000:2256])


def _wrong_normalisation(net: Any) -> None:
    net.conv.register_forward_pre_hook(lambda module, given: ((given[0] - 0.5) / 0.5,))


def _swapped_channel(net: Any) -> None:
    net.conv.weight.data = net.conv.weight.data[[1, 0, *range(2, len(net.conv.weight))]]


def _missing_fold(net: Any) -> None:
    """Batch norm as a fresh one: what a fold that was forgotten computes."""
    net.norm.reset_running_stats()


def _truncated_weight(net: Any) -> None:
    net.linear.weight.data[:, -1] = 0


@pytest.mark.parametrize("fault", [None, _wrong_normalisation, _swapped_channel, _missing_fold, _truncated_weight])
def test_a_fault_on_the_way_to_onnx_is_caught(fault: Any, trained: Trained, tmp_path: Path) -> None:
    """What `export` does with a parity that is broken is in test_exporting: nothing is left behind, exit code 6."""
    from robustkd.exporting.to_onnx import to_onnx

    other = copy.deepcopy(trained.net)
    if fault is not None:
        fault(other)
    file = to_onnx(other, tmp_path / "t.onnx", input_shape=(1, 28, 28), classes=list("0123456789"))
    source = PytorchEngine(trained.net, input_shape=(1, 28, 28), classes=10)
    parity = compare(source, OrtEngine(file), trained.images)
    if fault is None:
        assert check(parity).ok
        return
    with pytest.raises(NumericsError, match="parity broken between source and export") as caught:
        check(parity)
    assert caught.value.exit_code == 6


def _halve_scale(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and "weight" in n.input[0])
    replace(model, node.input[1], array(model, node.input[1]) / 2)


def _swap_channels(model: Any) -> None:
    """The integers of the output channels change places, their scales do not."""
    name = next(t.name for t in model.graph.initializer if t.name.endswith("weight_quantized"))
    replace(model, name, array(model, name)[::-1].copy())


def _truncate(model: Any) -> None:
    name = next(t.name for t in model.graph.initializer if t.name.endswith("weight_quantized"))
    values = array(model, name).copy()
    values.reshape(-1)[values.size // 2 :] = 0
    replace(model, name, values)


def _shift_input(model: Any) -> None:
    """The images are scaled once more on their way in."""
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "images")
    wider = numpy_helper.from_array(array(model, node.input[1]) * np.float32(3), "wider")
    model.graph.initializer.append(wider)
    node.input[1] = wider.name


@pytest.mark.parametrize("profile", ["trt", "ort-cpu"])
@pytest.mark.parametrize("fault", [None, _halve_scale, _swap_channels, _truncate, _shift_input])
def test_a_fault_of_the_int8_pass_is_caught(fault: Any, profile: Any, trained: Trained, tmp_path: Path) -> None:
    from robustkd.exporting.calibration import Calibrated
    from robustkd.exporting.precision import lower

    full, x = trained.file, trained.images
    target = Target(name="t", precision="int8", int8_profile=profile)
    made = lower(onnx.load(str(full)), target, Calibrated(x[:128], {"n": 128})).model
    if fault is not None:
        fault(made)
    file = tmp_path / "int8.onnx"
    file.write_bytes(made.SerializeToString())
    gate = GATES["int8"]
    parity = compare(OrtEngine(full), OrtEngine(file), x, gate=gate, between=("fp32", "int8"))
    if fault is None:
        assert check(parity).ok
        return
    with pytest.raises(NumericsError, match="parity broken between fp32 and int8") as caught:
        check(parity)
    assert "--keep-fp32" in caught.value.fix


def _weight_of(model: Any, rng: Any) -> tuple[str, str, Any]:
    """Names of the integers of some weight and of its scale, and the integers."""
    found = [
        (node.input[0], node.input[1])
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and "weight" in node.input[0]
    ]
    whole, scale = found[rng.integers(len(found))]
    return whole, scale, array(model, whole).copy()


def _one_channel_zero(model: Any, rng: Any) -> None:
    name, _, values = _weight_of(model, rng)
    values[rng.integers(len(values))] = 0
    replace(model, name, values)


def _two_channels_swapped(model: Any, rng: Any) -> None:
    name, _, values = _weight_of(model, rng)
    one, two = rng.choice(len(values), 2, replace=False)
    values[[one, two]] = values[[two, one]]
    replace(model, name, values)


def _one_scale_doubled(model: Any, rng: Any) -> None:
    _, name, _ = _weight_of(model, rng)
    scales = np.atleast_1d(array(model, name)).copy()
    scales[rng.integers(len(scales))] *= 2
    replace(model, name, scales.reshape(array(model, name).shape))


def _bias_zero(model: Any, rng: Any) -> None:
    name = next(t.name for t in model.graph.initializer if "bias" in t.name and t.dims and not t.name.endswith("scale"))
    replace(model, name, np.zeros_like(array(model, name)))


def _activation_scale_doubled(model: Any, rng: Any) -> None:
    """Of a pair, so that the linter finds nothing: half of the levels are never used."""
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    name = nodes[rng.integers(len(nodes))].input[1]
    replace(model, name, array(model, name) * np.float32(2))


def _activation_gone(model: Any, rng: Any) -> None:
    """Where the pass leaves the activation to the range, the quantizing; otherwise the activation itself."""
    kinds = [node for node in model.graph.node if node.op_type == "Relu"]
    if kinds:
        kinds[0].op_type = "Identity"
        return
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    quantizing = next(node for node in model.graph.node if conv.output[0] in node.input)
    model.graph.node.append(onnx.helper.make_node("Identity", [conv.output[0]], ["past"], "past"))
    assert quantizing.op_type == "QuantizeLinear"


def _other_stride(model: Any, rng: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    attribute = next(a for a in conv.attribute if a.name == "pads")
    attribute.ints[:] = [0, 0, 2, 2]


_QUIET = [
    _one_channel_zero,
    _two_channels_swapped,
    _one_scale_doubled,
    _bias_zero,
    _activation_scale_doubled,
    _activation_gone,
    _other_stride,
]


@pytest.fixture(scope="module", params=["trt", "ort-cpu", "int8-fp16"])
def pair(request: pytest.FixtureRequest, trained: Trained) -> tuple[Any, Any, Any]:
    """The fp32 graph, the same in int8, and the ranges that it was made with."""
    profile = "trt" if request.param == "int8-fp16" else request.param
    source = inferred(onnx.load(str(trained.file)))
    ranges = measure(source, trained.images[:64], Calibration(), tensors(source, profile))
    made = quantize(source, ranges, profile)
    return source, to_half(made) if request.param == "int8-fp16" else made, full_ranges(source, ranges)


class TestHeld:
    """What logits need not show: each fault in the file is found whatever the weights it falls on."""

    def test_the_right_file_is_within_rounding(self, pair: tuple[Any, Any, Any]) -> None:
        source, made, ranges = pair
        found = hold(source, made, ranges)
        assert found.constants == 5 and found.scales >= 1 and 0.1 < found.largest_error <= 1

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("fault", _QUIET)
    def test_a_fault_is_found(self, fault: Any, seed: int, pair: tuple[Any, Any, Any]) -> None:
        source, made, ranges = pair
        mutant = copy.deepcopy(made)
        fault(mutant, np.random.default_rng(seed))
        with pytest.raises(NumericsError, match="not the one it was made from") as caught:
            hold(source, mutant, ranges)
        assert caught.value.exit_code == 6 and caught.value.where

    def test_fp16_alone(self, trained: Trained) -> None:
        source = inferred(onnx.load(str(trained.file)))
        half = to_half(source)
        found = hold(source, half)
        assert 0 < found.largest_error < 1 and not found.scales
        name = next(t.name for t in half.graph.initializer if "linear.weight" in t.name)
        values = array(half, name).copy()
        values.flat[3] *= np.float16(1.01)
        replace(half, name, values)
        with pytest.raises(NumericsError, match=r"1 of 60 numbers of linear\.weight"):
            hold(source, half)


def test_a_share_of_classes_that_must_stay(checkpoint: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file passes its usual gate and is stopped by a target that wants more than there can be."""
    images = parity_images(checkpoint, n=32).floats()
    source = exporting.source_engine(checkpoint)
    flipped = compare(source, source, images, gate=Gate(agreement=1.0))
    assert check(flipped).ok and flipped.min_agreement == 1.0
    worse = flipped.model_copy(update={"agreement": 0.99, "ok": False})
    with pytest.raises(NumericsError, match=r"same class on 99.0%, wanted 100.0%"):
        check(worse)


class TestImporter:
    """The last gate: an importer that computes otherwise stops the export; where it cannot follow, the file is not at fault."""

    def test_another_function_is_caught(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: dict[str, Bundle]
    ) -> None:
        from robustkd.engines import onnx_torch

        class Off(onnx_torch.OnnxTorchEngine):
            def logits(self, x: np.ndarray) -> np.ndarray:
                return super().logits(1 - x)

        monkeypatch.setattr(onnx_torch, "OnnxTorchEngine", Off)
        file, images = built["half"].file(".onnx"), np.random.default_rng(0).random((8, 1, 28, 28)).astype(np.float32)
        with pytest.raises(NumericsError, match="between runtime and importer"):
            exporting._imported(file, Target(name="half", precision="fp16"), images)

    def test_an_operator_that_is_not_covered_is_told(self, monkeypatch: pytest.MonkeyPatch, built: dict[str, Bundle]) -> None:
        from robustkd.engines import onnx_torch

        def refuse(*args: object, **options: object) -> None:
            raise ArtifactError("operator NonZero is not covered", where="model.onnx", fix="audit it with its source")

        monkeypatch.setattr(onnx_torch, "OnnxTorchEngine", refuse)
        images = np.zeros((2, 1, 28, 28), np.float32)
        told = exporting._imported(built["half"].file(".onnx"), Target(name="half", precision="fp16"), images)
        assert told == {"skipped": "operator NonZero is not covered"}
