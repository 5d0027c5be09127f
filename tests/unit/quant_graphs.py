"""A residual network of two convolutions made by hand, small enough that every pass over it takes milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from robustkd.exporting.graphs import inferred

SHAPE = (2, 8, 8)
CLASSES = 3


def residual(opset: int = 20, seed: int = 0, batch: int | str = "batch") -> Any:
    """images -> (x - mean) -> c1 -> ReLU -> c2 -> + skip -> ReLU -> mean over pixels -> logits (batch, 3); types inferred."""
    rng = np.random.default_rng(seed)
    weights = {
        "mean": np.full((1, 2, 1, 1), 0.5, np.float32),
        "stem.c1.weight": rng.normal(0, 0.5, (4, 2, 3, 3)).astype(np.float32),
        "stem.c1.bias": rng.normal(0, 0.1, 4).astype(np.float32),
        "body.c2.weight": rng.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32),
        "body.c2.bias": rng.normal(0, 0.1, 4).astype(np.float32),
        "head.weight": rng.normal(0, 1, (CLASSES, 4)).astype(np.float32),
        "head.bias": rng.normal(0, 0.1, CLASSES).astype(np.float32),
    }
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["centred"], "normalise"),
        helper.make_node("Conv", ["centred", "stem.c1.weight", "stem.c1.bias"], ["a"], "c1", **pads),
        helper.make_node("Relu", ["a"], ["b"], "relu1"),
        helper.make_node("Conv", ["b", "body.c2.weight", "body.c2.bias"], ["c"], "c2", **pads),
        helper.make_node("Add", ["c", "b"], ["d"], "sum"),
        helper.make_node("Relu", ["d"], ["e"], "relu2"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], "pool"),
        helper.make_node("Flatten", ["f"], ["g"], "flat"),
        helper.make_node("Gemm", ["g", "head.weight", "head.bias"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    model.metadata_props.add(key="robustkd.precision", value="fp32")
    return inferred(model)


def pictures(n: int = 64, seed: int = 1) -> Any:
    """Images in [0, 1]."""
    return np.random.default_rng(seed).random((n, *SHAPE), dtype=np.float32)


def run(model: Any, x: Any) -> Any:
    """The logits, without the optimiser, so that the graph as written is what runs."""
    from robustkd.engines.ort import open_session

    onnx.checker.check_model(model, full_check=True)
    return open_session(model.SerializeToString(), threads=1, optimize=False).run(None, {"images": x})[0]


def array(model: Any, name: str) -> Any:
    """A constant of the graph."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def replace(model: Any, name: str, value: Any) -> None:
    """Give a constant another value."""
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(value, name))
