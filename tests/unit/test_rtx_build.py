"""Real engines by the real TensorRT-RTX builder, which needs no GPU. Nothing here runs one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robustkd.bundle import Bundle
from robustkd.engines._plan import read_header
from robustkd.engines._tensorrt import library, log_of
from robustkd.errors import ArtifactError, NumericsError, RequirementError, RobustKDError
from robustkd.exporting.trt.builder import build
from robustkd.exporting.trt.bundle import build_bundle, engine_target
from robustkd.exporting.trt.refusals import refusal
from robustkd.recipe.target import EngineOptions
from tests.fake_tensorrt import rtx_installed
from tests.unit.onnx_graphs import SHAPE, finish, linear, save

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(not rtx_installed(), reason="TensorRT-RTX is not installed: pip install 'robustkd[rtx]'"),
]


def made(model: onnx.ModelProto, batch: tuple[int, int, int] = (1, 8, 64), **options: Any) -> bytes:
    """The plan of a graph."""
    trt = library("rtx")
    return build(trt, log_of(trt), model.SerializeToString(), "rtx", EngineOptions(**options), batch=batch).plan


def quantized_conv(kind: Any = np.int8, zero: int = 0, *, int_bias: bool = False) -> onnx.ModelProto:
    """images -> Q -> DQ -> conv -> mean -> logits, with what TensorRT does not take on request."""
    held: dict[str, Any] = {"scale": np.float32(1 / 127), "zero": kind(zero), "w": np.ones((3, 2, 3, 3), np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
    ]
    if int_bias:
        held |= {"bq": np.ones(3, np.int32), "bs": np.float32(0.1), "bz": np.int32(0)}
        nodes.append(helper.make_node("DequantizeLinear", ["bq", "bs", "bz"], ["b"], name="bias"))
    nodes += [
        helper.make_node("Conv", ["dq", "w", *(["b"] if int_bias else [])], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["logits"]),
    ]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    return finish(nodes, ["batch", *SHAPE], TensorProto.FLOAT, weights)


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        ((), ("sm80", "sm86", "sm89", "sm120", "sm121", "newer")),
        (("sm86", "sm89"), ("sm86", "sm89")),
        (("sm120",), ("sm120",)),
    ],
)
def test_the_header_says_version_and_gpus(wanted: tuple[str, ...], targets: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(made(linear(), capabilities=wanted))
    header = read_header(tmp_path / "m.engine")
    assert header is not None and (header.kind, header.version) == ("rtx", library("rtx").__version__)
    assert header.targets == targets


def test_int8_in_tensorrts_form_is_taken() -> None:
    assert made(quantized_conv(), capabilities=("sm86",))


def test_a_fixed_batch_needs_no_profile() -> None:
    assert made(linear(batch=4))


REFUSED: dict[str, tuple[Callable[[], Any], type[RobustKDError], str, str]] = {
    "uint8": (
        lambda: made(quantized_conv(np.uint8)),
        NumericsError,
        "reads a uint8 tensor as int8, which computes another function",
        "--int8-profile trt",
    ),
    "zero point": (lambda: made(quantized_conv(zero=3)), ArtifactError, "a zero point that is not 0", "--int8-profile trt"),
    "int32 bias": (
        lambda: made(quantized_conv(int_bias=True)),
        ArtifactError,
        "an int32 bias behind DequantizeLinear",
        "--int8-profile trt",
    ),
    "operator": (
        lambda: made(finish([helper.make_node("Foo", ["images"], ["logits"])], ["batch", *SHAPE], TensorProto.FLOAT, [])),
        ArtifactError,
        "an operator that TensorRT does not have",
        "standard operators",
    ),
    "unknown GPU": (
        lambda: made(linear(), capabilities=("sm86", "sm87")),
        RequirementError,
        "cannot build for sm87; it knows sm75, sm80, sm86",
        "--trt",
    ),
    "float32 product on Turing": (
        lambda: made(linear(), capabilities=("sm75",)),
        RequirementError,
        "Turing (sm75) has no float32 matrix product",
        "fp16",
    ),
    "free height": (lambda: made(linear(shape=(2, "h", 5))), ArtifactError, "only the batch may be free", "fixed"),
    "text for a graph": (
        lambda: build(library("rtx"), log_of(library("rtx")), b"hello world", "rtx", EngineOptions()),
        ArtifactError,
        "the graph has 0 inputs",
        "one input of images",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_which_rule_is_broken(name: str) -> None:
    call, error, what, fix = REFUSED[name]
    with pytest.raises(error) as caught:
        call()
    assert what in caught.value.what and fix in caught.value.fix and caught.value.where


def _raw(profile: bool, capability: str = "") -> list[str]:
    """What the library itself logs when it is asked for what our builder never asks."""
    trt = library("rtx")
    log = log_of(trt)
    builder = trt.Builder(log.handle)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.handle)
    assert parser.parse(linear().SerializeToString())
    config = builder.create_builder_config()
    if profile:
        sizes = builder.create_optimization_profile()
        sizes.set_shape("images", (1, *SHAPE), (1, *SHAPE), (1, *SHAPE))
        config.add_optimization_profile(sizes)
    if capability:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    assert builder.build_serialized_network(network, config) is None
    return log.errors()


def test_a_missing_profile_is_explained() -> None:
    error = refusal("rtx", _raw(profile=False), "m.onnx")
    assert "no batch sizes are given" in error.what and "--batch 1:8:64" in error.fix and error.exit_code == 5


def test_the_gpu_of_this_machine_without_a_driver_is_explained() -> None:
    from robustkd.engines._driver import probe

    if probe().gpus:
        pytest.skip("this machine has a GPU")
    error = refusal("rtx", _raw(profile=True, capability="CURRENT"), "m.onnx")
    assert "needs its driver" in error.what and "--target sm86" in error.fix and error.exit_code == 4


def test_a_bundle_with_engine_twin_sidecar_and_log(tmp_path: Path) -> None:
    file = save(linear(precision="fp32", max_batch="32", architecture="linear"), tmp_path)
    target = engine_target("rtx", "fp32", engine={"capabilities": ["sm86"]})
    bundle = build_bundle(file, target, tmp_path / "out")
    assert sorted(bundle.manifest.files) == ["build.log", "model.engine", "model.engine.json", "model.onnx"]
    facts = (bundle.manifest.model_extra or {})["engine"]
    assert (facts["verified"], facts["reason"]) == (False, "no device")
    assert facts["batch"] == [1, 8, 32], "within what the graph promises"
    assert facts["tf32"] is False and facts["capabilities"] == ["sm86"]
    assert facts["onnx"]["sha256"] == bundle.manifest.files["model.onnx"]
    told = json.loads((bundle.path / "model.engine.json").read_bytes())
    assert told["sha256"] == bundle.manifest.files["model.engine"] and told["model"]["architecture"] == "linear"
    Bundle.open(bundle.path, kind="engine")


def test_a_float_file_becomes_fp16_on_the_way(tmp_path: Path) -> None:
    file = save(linear(precision="fp32"), tmp_path)
    bundle = build_bundle(file, engine_target("rtx", "fp16", engine={"capabilities": ["sm75"]}), tmp_path / "out")
    assert bundle.manifest.precision == "fp16"
    twin = onnx.load(bundle.file(".onnx"))
    assert any(weight.data_type == TensorProto.FLOAT16 for weight in twin.graph.initializer)
