"""Tiny ONNX graphs around one operator, and both ways of running them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from robustkd.engines.importer.load import import_onnx
from robustkd.engines.importer.module import OnnxModule

SHAPE = (4, 5, 6)
FLOAT, FLOAT16, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.BOOL,
)


class Case(NamedTuple):
    """Nodes from `images` to `y`, with the weights they read.

    `smooth` says that the gradient can be held against finite differences; `since` and `until` are opsets.
    """

    nodes: list[Any]
    weights: dict[str, Any]
    smooth: bool = True
    since: int = 1
    until: int = 99
    shape: tuple[int, ...] = SHAPE
    batch: int | str = "batch"


def one(op: str, *weights: Any, smooth: bool = True, since: int = 1, until: int = 99, **more: Any) -> Case:
    """One node that reads the images and then the weights, None where an input is left out; more are attributes."""
    shape, batch = more.pop("shape", SHAPE), more.pop("batch", "batch")
    first = more.pop("first", "images")
    named = {f"w{i}": np.asarray(w) for i, w in enumerate(weights) if w is not None}
    inputs = [first, *(f"w{i}" if w is not None else "" for i, w in enumerate(weights))]
    return Case([helper.make_node(op, inputs, ["y"], name=f"the_{op}", **more)], named, smooth, since, until, shape, batch)


def model(case: Case, opset: int) -> onnx.ModelProto:
    """The case as a classifier: its output is cast to float and flattened."""
    ends = [
        helper.make_node("Cast", ["y"], ["as_float"], to=FLOAT),
        helper.make_node("Flatten", ["as_float"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        [*case.nodes, *ends],
        "graph",
        [helper.make_tensor_value_info("images", FLOAT, [case.batch, *case.shape])],
        [helper.make_tensor_value_info("logits", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in case.weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 8 if opset < 19 else 9 if opset < 21 else 10
    return made


def by_runtime(made: onnx.ModelProto, x: Any, *, optimize: bool = False) -> Any:
    """What ONNX Runtime answers, as a rule with its optimiser off."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x})[0]


def imported(made: onnx.ModelProto, **options: Any) -> OnnxModule:
    """What the importer makes of it."""
    return import_onnx(made, **options)


def images(shape: tuple[int, ...] = SHAPE, n: int = 3, *, seed: int = 0) -> Any:
    """Numbers on both sides of zero, far from any kink of an activation by the luck of the seed."""
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32) * 2
