"""int8 over a graph made by hand: ranges, both placements, what stays in float, and the linter's rules one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robustkd.errors import ArtifactError, ConfigError, NumericsError
from robustkd.exporting.calibration import Calibrated
from robustkd.exporting.graphs import find_nodes, producers
from robustkd.exporting.half import to_half
from robustkd.exporting.int8 import layers, quantize, tensors
from robustkd.exporting.precision import lower
from robustkd.exporting.qdq_rules import check, lint
from robustkd.exporting.ranges import measure
from robustkd.exporting.sensitivity import sensitivity
from robustkd.recipe.target import Calibration, Target
from tests.unit.quant_graphs import array, pictures, replace, residual, run

X = pictures()
PROFILES: tuple[Any, ...] = ("trt", "ort-cpu")


def _quantized(profile: Any, model: Any = None, **options: Any) -> Any:
    model = model or residual()
    return quantize(model, measure(model, X, Calibration(), tensors(model, profile)), profile, **options)


def _rules(model: Any, profile: Any = "trt") -> set[tuple[str, str]]:
    return {(finding.node, finding.rule) for finding in lint(model, profile)}


class TestRanges:
    def test_minmax_is_the_smallest_and_largest_value(self) -> None:
        model = residual()
        got = measure(model, X, Calibration(method="minmax"), ["images", "b", "logits"])
        logits = run(model, X)
        assert got["images"] == (float(X.min()), float(X.max()))
        assert got["logits"] == pytest.approx((logits.min(), logits.max()), abs=1e-6)
        assert got["b"][0] == 0 and set(got) == {"images", "b", "logits"}

    @pytest.mark.parametrize("percentile", [99.0, 90.0, 99.999])
    def test_a_percentile_leaves_that_share_inside(self, percentile: float) -> None:
        x = np.random.default_rng(0).beta(2, 5, (400, 2, 8, 8)).astype(np.float32)
        low, high = measure(residual(), x, Calibration(percentile=percentile), ["images"])["images"]
        inside = float(((x >= low) & (x <= high)).mean())
        assert inside == pytest.approx(percentile / 100, abs=1e-3) and inside >= percentile / 100 - 1e-9

    def test_batches_do_not_matter_and_a_constant_tensor_has_its_value(self) -> None:
        model = residual()
        replace(model, "stem.c1.bias", np.full(4, -1e3, np.float32))  # the ReLU lets nothing through
        got = measure(model, X[:33], Calibration(), ["b", "images"])
        assert got["b"] == (0.0, 0.0)
        order = np.random.default_rng(0).permutation(33)
        assert measure(model, X[:33][order], Calibration(), ["images"])["images"] == got["images"]

    def test_a_fixed_batch(self) -> None:
        assert measure(residual(batch=1), X[:5], Calibration(), ["b"]) == measure(residual(), X[:5], Calibration(), ["b"])

    def test_no_images_wrong_images_and_no_number(self) -> None:
        model = residual()
        with pytest.raises(ArtifactError, match="no calibration images"):
            measure(model, X[:0], Calibration(), ["b"])
        with pytest.raises(ArtifactError, match=r"shape \(3, 8, 8\), the model takes \(2, 8, 8\)"):
            measure(model, np.zeros((4, 3, 8, 8), np.float32), Calibration(), ["b"])
        replace(model, "stem.c1.bias", np.full(4, np.nan, np.float32))
        with pytest.raises(NumericsError, match="NaN or infinite") as caught:
            measure(model, X, Calibration(), ["c"])
        assert caught.value.where == "c"


class TestPlacement:
    @pytest.mark.parametrize("profile", PROFILES)
    def test_logits_stay_close_and_the_rules_hold(self, profile: Any) -> None:
        model = residual()
        made = _quantized(profile, model)
        want, got = run(model, X), run(made, X)
        assert 0 < np.abs(got - want).max() < 0.05 * np.ptp(want)
        assert lint(made, profile) == []

    def test_trt_quantizes_inputs_of_convolutions_and_the_skip_and_nothing_else(self) -> None:
        made = _quantized("trt")
        written = producers(made.graph)
        read = {n.name: [written[i].op_type if i in written else "" for i in n.input] for n in made.graph.node}
        assert read["c1"][:2] == read["c2"][:2] == ["DequantizeLinear"] * 2
        assert read["c1"][2] == read["c2"][2] == ""  # float bias
        assert sorted(read["sum"]) == ["Conv", "DequantizeLinear"]
        assert (
            read["relu1"] == ["Conv"] and read["relu2"] == ["Add"] and read["pool"] == ["Relu"] and read["head"][0] == "Flatten"
        )
        zeros = {array(made, n.input[2]).dtype.name for n in made.graph.node if n.op_type == "QuantizeLinear"}
        assert zeros == {"int8"}
        assert array(made, "body.c2.weight_scale").shape == (4,)

    def test_ort_cpu_is_unsigned_absorbs_the_relu_and_leaves_the_logits_float(self) -> None:
        made = _quantized("ort-cpu")
        kinds = Counter(n.op_type for n in made.graph.node)
        assert not kinds["Relu"] and kinds["QuantizeLinear"] == 6
        zeros = {array(made, n.input[2]).dtype.name for n in made.graph.node if n.op_type == "QuantizeLinear"}
        assert zeros == {"uint8"}
        assert producers(made.graph)["logits"].op_type == "Gemm"

    @pytest.mark.parametrize("profile", PROFILES)
    def test_a_kept_node_keeps_its_weights(self, profile: Any) -> None:
        made = _quantized(profile, keep=["c2"])
        assert array(made, "body.c2.weight").dtype == np.float32
        assert not any(t.name == "body.c2.weight_quantized" for t in made.graph.initializer)
        assert lint(made, profile) == []
        run(made, X)

    @pytest.mark.parametrize("profile", PROFILES)
    def test_root_logging_is_left_alone(self, profile: Any) -> None:
        import logging

        before = [*logging.getLogger().handlers], logging.getLogger().level
        _quantized(profile)
        assert ([*logging.getLogger().handlers], logging.getLogger().level) == before

    def test_int8_with_an_fp16_rest_keeps_the_rules(self) -> None:
        model = residual()
        made = to_half(_quantized("trt", model))
        assert lint(made, "trt") == []
        assert np.abs(run(made, X) - run(model, X)).max() < 0.05 * np.ptp(run(model, X))


class TestLower:
    def test_facts_and_table(self) -> None:
        target = Target(name="t", precision="int8", keep_fp32=("stem.c1",))
        made = lower(residual(), target, Calibrated(X, {"n": len(X), "seed": 0}))
        assert made.facts["kept"] == ["c1"] and made.facts["layers"] == 1
        assert [s["node"] for s in made.facts["sensitive"]] == ["c2"]
        assert made.table is not None and made.table["n"] == 64
        skip = made.table["tensors"]["b"]
        assert skip["zero_point"] == 0 and skip["scale"] == pytest.approx(skip["high"] / 127.5, rel=0.01)
        told = {e.key: e.value for e in made.model.metadata_props}
        assert told == {"robustkd.precision": "int8", "robustkd.int8_profile": "trt"}

    def test_an_unknown_node_is_named_with_a_guess(self) -> None:
        with pytest.raises(ConfigError, match=r"no node body\.c3") as caught:
            lower(residual(), Target(name="t", precision="fp16", keep_fp32=("body.c3",)))
        assert "did you mean body.c2?" in caught.value.fix
        assert find_nodes(residual(), ["body.c2", "c2", "head"]) == ("c2", "head")

    def test_sensitivity_orders_layers_by_what_they_do_alone(self) -> None:
        """The weights of c1 are made coarse: the scale of each channel follows one huge tap."""
        model = residual()
        weight = array(model, "stem.c1.weight").copy()
        weight[:, 0, 0, 0] = 40.0
        replace(model, "stem.c1.weight", weight)
        ranges = measure(model, X, Calibration(), tensors(model, "trt"))
        found = sensitivity(model, ranges, "trt", X)
        assert {f.node for f in found} == {n.name for n in layers(model, "trt")} == {"c1", "c2"}
        assert [f.mean_abs for f in found] == sorted((f.mean_abs for f in found), reverse=True)
        alone = {f.node: f.mean_abs for f in found}
        want = np.abs(run(quantize(model, ranges, "trt", only=["c1"]), X) - run(model, X)).mean()
        assert alone["c1"] == pytest.approx(want, rel=0.2)


def _edit(model: Any, op: str, reads: str, change: Any) -> Any:
    node = next(n for n in model.graph.node if n.op_type == op and reads in n.input[0])
    change(model, node)
    return model


def _constant(model: Any, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _set(place: int, name: str, value: Any) -> Any:
    def change(model: Any, node: Any) -> None:
        node.input[place] = _constant(model, name, value)

    return change


class TestRules:
    """Each mutation of a correct graph breaks the rule named, at the node named."""

    def test_zero_point_and_sign(self) -> None:
        made = _edit(_quantized("trt"), "QuantizeLinear", "b", _set(2, "zp", np.int8(3)))
        assert ("b_QuantizeLinear", "zero point") in _rules(made)
        made = _edit(_quantized("trt"), "QuantizeLinear", "b", _set(2, "zp", np.uint8(0)))
        assert ("b_QuantizeLinear", "signed") in _rules(made)
        made = _quantized("trt")
        node = next(n for n in made.graph.node if n.op_type == "QuantizeLinear")
        del node.input[2]
        assert (node.name, "signed") in _rules(made)

    @pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
    def test_scale(self, value: float) -> None:
        made = _edit(_quantized("trt"), "QuantizeLinear", "b", _set(1, "s", np.float32(value)))
        assert ("b_QuantizeLinear", "scale") in _rules(made)

    def test_fp16_scales_need_opset_19(self) -> None:
        made = to_half(_quantized("trt"))
        made.opset_import[0].version = 18
        assert "scale" in {rule for _, rule in _rules(made)}

    def test_a_pair_with_two_scales(self) -> None:
        made = _edit(_quantized("trt"), "DequantizeLinear", "b_Q", _set(1, "s", np.float32(9)))
        assert ("b_DequantizeLinear", "matching pairs") in _rules(made)

    def test_a_quantizer_without_its_other_half(self) -> None:
        made = _quantized("trt")
        node = next(n for n in made.graph.node if n.name == "b_DequantizeLinear")
        made.graph.node.remove(node)
        assert ("b_QuantizeLinear", "pairs") in _rules(made)

    def test_quantized_logits_are_broken_for_both(self) -> None:
        for profile in PROFILES:
            made = _quantized(profile)
            last = producers(made.graph)["logits"]
            last.output[0] = "raw"
            scale = _constant(made, "ls", np.float32(0.1))
            zero = _constant(made, "lz", np.int8(0) if profile == "trt" else np.uint8(128))
            made.graph.node.extend(
                [
                    helper.make_node("QuantizeLinear", ["raw", scale, zero], ["lq"], "lq"),
                    helper.make_node("DequantizeLinear", ["lq", scale, zero], ["logits"], "ldq"),
                ]
            )
            assert _rules(made, profile) == {("ldq", "float logits")}

    def test_the_other_profile_breaks_the_rules_of_trt(self) -> None:
        found = _rules(_quantized("ort-cpu"))
        assert {"signed", "float bias", "residual sum", "float classifier"} <= {rule for _, rule in found}
        assert ("c2", "float bias") in found and ("sum", "residual sum") in found and ("head", "float classifier") in found

    def test_trt_breaks_the_rules_of_the_cpu(self) -> None:
        assert {rule for _, rule in _rules(_quantized("trt"), "ort-cpu")} == {"unsigned activations", "integer bias"}

    def test_weights_per_tensor_and_activations_per_channel(self) -> None:
        made = _edit(_quantized("trt"), "DequantizeLinear", "body.c2.weight", _set(1, "s", np.float32(0.01)))
        assert ("body.c2.weight_DequantizeLinear", "weights per channel") in _rules(made)
        made = _edit(_quantized("trt"), "QuantizeLinear", "b", _set(1, "s", np.ones(4, np.float32)))
        assert ("b_QuantizeLinear", "activations per tensor") in _rules(made)

    def test_between_convolution_and_activation(self) -> None:
        made = _quantized("trt")
        relu = next(n for n in made.graph.node if n.name == "relu1")
        scale, zero = _constant(made, "rs", np.float32(0.1)), _constant(made, "rz", np.int8(0))
        relu.input[0] = "rdq"
        made.graph.node.extend(
            [
                helper.make_node("QuantizeLinear", ["a", scale, zero], ["rq"], "between"),
                helper.make_node("DequantizeLinear", ["rq", scale, zero], ["rdq"], "after"),
            ]
        )
        assert ("between", "activation after convolution") in _rules(made)

    def test_ends_in_half_precision(self) -> None:
        made = _quantized("trt")
        made.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        assert ("images", "float ends") in _rules(made)

    def test_check_names_node_rule_and_how_many_more(self) -> None:
        with pytest.raises(ArtifactError) as caught:
            check(_quantized("ort-cpu"), "trt", where="model.onnx")
        assert "breaks the rule signed of int8 for trt" in caught.value.what and " more)" in caught.value.what
        assert caught.value.where == "model.onnx" and "--keep-fp32" in caught.value.fix
        check(_quantized("trt"), "trt")


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_opset_quantizes_and_runs(opset: int, profile: Any) -> None:
    model = residual(opset)
    made = _quantized(profile, model)
    assert next(o.version for o in made.opset_import if not o.domain) == opset
    assert np.abs(run(made, X) - run(model, X)).max() < 0.05 * np.ptp(run(model, X))
    onnx.checker.check_model(made, full_check=True)
