"""Small ONNX graphs made by hand, so that the engine's tests need no exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = (2, 5, 5)
CLASSES = 4


def linear(
    *, batch: int | str = "batch", kind: int = TensorProto.FLOAT, shape: tuple[Any, ...] = SHAPE, seed: int = 0, **metadata: str
) -> onnx.ModelProto:
    """images (batch, 2, 5, 5) -> flatten -> one matrix -> logits (batch, 4); `robustkd.` metadata by keyword."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(int(np.prod(SHAPE)), CLASSES)).astype(helper.tensor_dtype_to_np_dtype(kind))
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    return finish(nodes, [batch, *shape], kind, [numpy_helper.from_array(weight, "w")], **metadata)


def finish(nodes: list[Any], shape: list[Any], kind: int, weights: list[Any], **metadata: str) -> onnx.ModelProto:
    """A model of one input `images` and one output `logits`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("logits", kind, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    for key, value in metadata.items():
        model.metadata_props.add(key=f"robustkd.{key}", value=value)
    return model


def half_inside() -> onnx.ModelProto:
    """fp32 in and out, weights in half precision."""
    weight = np.random.default_rng(0).normal(size=(50, CLASSES)).astype(np.float16)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "w"], ["out"]),
        helper.make_node("Cast", ["out"], ["logits"], to=TensorProto.FLOAT),
    ]
    return finish(nodes, ["batch", *SHAPE], TensorProto.FLOAT, [numpy_helper.from_array(weight, "w")])


def quantized() -> onnx.ModelProto:
    """The input passes through int8 and back."""
    constants = {"scale": np.float32(1 / 127), "zero": np.int8(0), "w": np.ones((50, CLASSES), np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("Flatten", ["dq"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    return finish(nodes, ["batch", *SHAPE], TensorProto.FLOAT, weights)


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Write the model."""
    file = folder / name
    file.write_bytes(model.SerializeToString())
    return file


def images(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> Any:
    """Random images in [0, 1], float32."""
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)
