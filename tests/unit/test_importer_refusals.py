"""What the importer does not cover is named: operator, node, opset, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from robustkd.engines.importer.load import import_onnx
from robustkd.engines.onnx_torch import OnnxTorchEngine
from robustkd.errors import ArtifactError
from tests.unit import onnx_graphs as graphs
from tests.unit.importer_graphs import FLOAT, Case, by_runtime, images, imported, model, one

REFUSED = {
    "an operator": (one("Hardmax"), "the importer does not cover Hardmax of node the_Hardmax: the operator is not known"),
    "a mode": (
        one("Resize", None, np.array([1, 1, 2, 2], np.float32), mode="cubic"),
        "does not cover Resize of node the_Resize: mode cubic",
    ),
    "training": (
        one("BatchNormalization", *[np.ones(4, np.float32)] * 4, training_mode=1),
        "training_mode 1: export the network in evaluation mode",
    ),
    "dilations": (one("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]), "dilations other than 1"),
    "an even window": (one("LRN", size=4), "an even size, 4"),
    "a shape": (one("Add", np.ones((3, 7), np.float32)), "Add of node the_Add: it does not run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_operator_node_and_opset(name: str) -> None:
    case, words = REFUSED[name]
    with pytest.raises(ArtifactError) as caught:
        imported(model(case, 20))
    assert words in caught.value.what and "opset 20" in caught.value.where and "--source" in caught.value.fix
    assert caught.value.exit_code == 5


def test_an_unknown_attribute_is_refused() -> None:
    made = model(one("Relu"), 20)
    made.graph.node[0].attribute.append(helper.make_attribute("consumed_inputs", [0]))
    with pytest.raises(ArtifactError, match="attribute consumed_inputs"):
        imported(made)


def test_an_operator_of_another_domain_is_refused() -> None:
    made = model(one("Gelu"), 20)
    made.graph.node[0].domain = "com.microsoft"
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ArtifactError, match=r"com.microsoft.Gelu of node the_Gelu: it is not part of the ONNX standard"):
        imported(made)


def test_a_branch_is_refused() -> None:
    branch = helper.make_graph([helper.make_node("Relu", ["images"], ["r"])], "then", [], [_value("r")])
    node = helper.make_node("If", ["c"], ["y"], name="fork", then_branch=branch, else_branch=branch)
    with pytest.raises(ArtifactError, match="If of node fork"):
        imported(model(Case([node], {"c": np.array(True)}), 20))


def _value(name: str) -> Any:
    return helper.make_tensor_value_info(name, FLOAT, None)


@pytest.mark.parametrize("opset", [8, 26])
def test_an_opset_out_of_range_is_refused(opset: int) -> None:
    made = model(one("Relu"), 20)
    made.opset_import[0].version = opset
    with pytest.raises(ArtifactError, match=f"opsets 9 to 24; this file has opset {opset}"):
        imported(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.input.append(_value("second")), "2 inputs"),
        (lambda g: g.output.append(_value("y")), "2 outputs"),
        (lambda g: g.input[0].type.tensor_type.shape.dim[2].ClearField("dim_value"), "not float32"),
        (lambda g: g.node[0].input.__setitem__(0, "nowhere"), "reads nowhere, which nothing before it makes"),
        (lambda g: g.node.pop(), "nothing in it makes its output logits"),
    ],
)
def test_a_graph_that_is_no_classifier_is_refused(change: Any, words: str) -> None:
    made = model(one("Relu"), 20)
    change(made.graph)
    with pytest.raises(ArtifactError, match=words):
        imported(made)


def test_an_output_that_is_not_a_row_of_logits_is_refused() -> None:
    made = model(one("Relu"), 20)
    made.graph.node[-1].attribute[0].i = 2
    with pytest.raises(ArtifactError, match=r"output has shape \(4, 30\) for 1 images"):
        imported(made)


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_files_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.onnx"):
        import_onnx(file)


def test_weights_in_another_file_are_found_or_missed(tmp_path: Path) -> None:
    made = graphs.linear()
    file, x = tmp_path / "x.onnx", graphs.images(3)
    want = by_runtime(made, x)
    onnx.save_model(made, str(file), save_as_external_data=True, location="x.data", size_threshold=0)
    np.testing.assert_allclose(import_onnx(file)(torch.from_numpy(x)).numpy(), want, rtol=1e-5)
    (tmp_path / "x.data").unlink()
    with pytest.raises(ArtifactError, match="its weights lie in another file, which cannot be read"):
        import_onnx(file)


def test_a_damaged_weight_is_named() -> None:
    made = graphs.linear()
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[:10]
    with pytest.raises(ArtifactError, match="weight w is damaged"):
        imported(made)


def test_functions_are_inlined() -> None:
    made = model(one("Relu"), 20)
    body = [helper.make_node("Neg", ["a"], ["n"]), helper.make_node("Relu", ["n"], ["b"])]
    made.functions.append(helper.make_function("own", "Flip", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    made.opset_import.append(helper.make_opsetid("own", 1))
    made.graph.node[0].op_type, made.graph.node[0].domain = "Flip", "own"
    x = images()
    np.testing.assert_array_equal(imported(made)(torch.from_numpy(x)).numpy(), by_runtime(made, x))


def test_a_fixed_batch_takes_any_number_of_images() -> None:
    fixed = model(Case(one("Relu").nodes, {}, batch=2), 20)
    module, x = imported(fixed), torch.from_numpy(images(n=5))
    assert module.batch is None  # it is only written down
    together = one("Softmax", axis=0)  # every image depends on those beside it
    module = imported(model(together._replace(batch=2), 20))
    assert module.batch == 2 and module(x).shape == (5, 120)
    torch.testing.assert_close(module(x)[:2], module(x[:2]))
    assert module(x[:0]).shape == (0, 120)


def test_a_constant_shape_of_a_fixed_batch_is_read_as_any() -> None:
    case = one("Reshape", np.array([2, 60, 2]), batch=2)
    module, x = imported(model(case, 20)), torch.from_numpy(images(n=5))
    assert module.batch is None
    torch.testing.assert_close(module(x), x.flatten(1))


def test_a_softmax_at_the_end_becomes_its_logarithm() -> None:
    made = graphs.linear()
    made.graph.node[-1].output[0] = "scores"
    made.graph.node.append(helper.make_node("Softmax", ["scores"], ["p"], axis=1))
    made.graph.node.append(helper.make_node("Identity", ["p"], ["logits"]))
    x = torch.from_numpy(graphs.images(4))
    probabilities = import_onnx(made)(x)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    torch.testing.assert_close(import_onnx(made, log_probabilities=True)(x), probabilities.log())
    plain = graphs.linear()
    torch.testing.assert_close(import_onnx(plain, log_probabilities=True)(x), import_onnx(plain)(x))


def test_the_engine_says_what_it_is(tmp_path: Path) -> None:
    file = graphs.save(graphs.quantized(), tmp_path)
    engine = OnnxTorchEngine(file, rounding="pass-through")
    assert engine.differentiable and engine.info.runtime == "onnx-torch" and engine.info.precision == "int8"
    assert engine.info.settings["rounding"] == "pass-through" and engine.info.settings["opset"] == 20
    x = torch.from_numpy(graphs.images(2)).requires_grad_(True)
    (grad,) = torch.autograd.grad(engine.net(x).sum(), x)
    assert (grad != 0).any() and not any(p.requires_grad for p in engine.net.parameters())


def test_weights_are_frozen_parameters_that_move_and_are_saved() -> None:
    module = imported(graphs.linear())
    assert [(tuple(p.shape), p.requires_grad) for p in module.parameters()] == [((50, 4), False)]
    assert module.double()(torch.rand(2, *graphs.SHAPE, dtype=torch.float64)).dtype == torch.float64


def test_a_weight_of_a_type_that_is_not_held_is_named() -> None:
    made = graphs.linear()
    made.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.uint64), "odd"))
    with pytest.raises(ArtifactError, match="weight odd is UINT64"):
        imported(made)
