"""The fp16 pass over a graph made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from robustkd.engines.ort import OrtEngine, open_session
from robustkd.errors import NumericsError
from robustkd.exporting.half import SMALLEST, to_half
from robustkd.exporting.int8 import quantize, tensors
from robustkd.exporting.ranges import measure
from robustkd.recipe.target import Calibration
from tests.unit.quant_graphs import array, pictures, replace, residual, run

X = pictures()


def _types(model: onnx.ModelProto) -> dict[str, int]:
    return {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}


def test_everything_inside_is_half_and_both_ends_are_float32() -> None:
    half = to_half(residual())
    types = _types(half)
    assert types["images"] == types["logits"] == TensorProto.FLOAT
    assert {types[name] for name in ("centred", "a", "b", "c", "d", "e", "f", "g")} == {TensorProto.FLOAT16}
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.FLOAT16}
    assert [n.op_type for n in half.graph.node].count("Cast") == 2


def test_logits_move_by_half_precision_and_no_more() -> None:
    want, got = run(residual(), X), run(to_half(residual()), X)
    assert 0 < np.abs(got - want).max() < 4e-3 * np.ptp(want)
    assert got.dtype == np.float32


def test_the_source_is_left_alone() -> None:
    model = residual()
    before = model.SerializeToString(deterministic=True)
    to_half(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_kept_node_computes_in_float32_with_its_own_weights() -> None:
    half = to_half(residual(), keep=["c2"])
    types = _types(half)
    assert types["c"] == TensorProto.FLOAT and types["a"] == TensorProto.FLOAT16
    assert array(half, "body.c2.weight").dtype == np.float32
    run(half, X)


def test_keeping_everything_changes_no_bit() -> None:
    model = residual()
    same = to_half(model, keep=[n.name for n in model.graph.node])
    np.testing.assert_array_equal(run(same, X), run(model, X))
    assert not any(n.op_type == "Cast" for n in same.graph.node)


def test_a_weight_beyond_the_range_names_its_node() -> None:
    model = residual()
    weight = array(model, "body.c2.weight").copy()
    weight[0, 0, 0, 0] = 1e5
    replace(model, "body.c2.weight", weight)
    with pytest.raises(NumericsError, match="beyond fp16") as caught:
        to_half(model)
    assert caught.value.where == "c2" and "--keep-fp32 c2" in caught.value.fix
    run(to_half(model, keep=["c2"]), X)


def test_scales_too_small_for_half_are_raised_and_the_function_kept() -> None:
    """A channel that batch norm switched off has weights of 1e-9: its scale would round to 0, and 0 times 0 / 0 is NaN."""
    model = residual()
    weight = array(model, "body.c2.weight").copy()
    weight[1] *= 1e-9
    replace(model, "body.c2.weight", weight)
    ranges = measure(model, X, Calibration(), tensors(model, "trt"))
    whole = quantize(model, ranges, "trt")
    half = to_half(whole)
    scales = array(half, "body.c2.weight_scale_fp16")
    assert scales.dtype == np.float16 and (scales >= np.float16(SMALLEST)).all()
    want, got = run(whole, X), run(half, X)
    assert np.isfinite(got).all() and np.abs(got - want).max() < 0.02 * np.ptp(want)


def test_constants_and_casts_inside_nodes_follow() -> None:
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Constant", [], ["two"], "two", value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Cast", ["images"], ["same"], "same", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["same", "two"], ["logits"], "mul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("images", "logits")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(run(to_half(model), x), 2 * x)


def test_the_optimiser_of_the_runtime_does_not_spoil_biases_beside_int8(tmp_path: Path) -> None:
    """Small weights under a large bias: the product of the two scales has no place in fp16, and dividing by it overflows."""
    model = residual()
    replace(model, "stem.c1.weight", array(model, "stem.c1.weight") / 50)
    replace(model, "stem.c1.bias", array(model, "stem.c1.bias") + np.float32(3))
    ranges = measure(model, X, Calibration(), tensors(model, "trt"))
    made = to_half(quantize(model, ranges, "trt"))
    file = tmp_path / "model.onnx"
    file.write_bytes(made.SerializeToString())
    want, plain = run(made, X), open_session(str(file), threads=1).run(None, {"images": X})[0]
    with OrtEngine(file, threads=1) as engine:
        assert engine.info.settings["graph_optimization"] == "all"
        assert np.abs(engine.logits(X) - want).max() < 0.02 * np.ptp(want)
    assert not np.abs(plain - want).max() < 0.02 * np.ptp(want), "ONNX Runtime is mended: let all of its passes run again"
