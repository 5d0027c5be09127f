"""Reading a ModelProto: nodes, constants, and which values are half precision. Nothing runs here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkd.engines.importer.node import Node, Settings, uncovered
from robustkd.engines.importer.quantization import FLOAT16
from robustkd.engines.importer.table import OPERATORS, OPSETS
from robustkd.errors import ArtifactError

_DOMAINS = ("", "ai.onnx")
_HELD = ("FLOAT", "DOUBLE", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL")
#: operators whose precision is that of another input than the first
_LIKE = {"CastLike": 1, "DequantizeLinear": 1, "Where": 1, "OneHot": 2}
_PASSING = ("Identity", "Cast", "Dropout")


@dataclass(frozen=True)
class Program:
    """A graph of one input and one output.

    Attributes:
        nodes: in the order they run.
        constants: weights and other fixed values; half precision is held in fp32.
        halves: the values that are half precision.
        image: name of the input.
        shape: its (C, H, W).
        batch: its fixed batch, or None.
        scores: name of the output.
        settings: shared by all nodes.
        opset: version of the operator set.
    """

    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]
    halves: frozenset[str]
    image: str
    shape: tuple[int, int, int]
    batch: int | None
    scores: str
    settings: Settings
    opset: int


def read_program(model: Any, settings: Settings, where: str) -> Program:
    """The program of a ModelProto.

    Args:
        model: with all weights inside.
        settings: for its nodes.
        where: the file, for messages.

    Raises:
        ArtifactError: it is no image classifier, or something in it is not covered.
    """
    opset = _opset(model, where)
    graph = model.graph
    if graph.sparse_initializer:
        raise _foreign("it has sparse weights", where)
    constants: dict[str, Tensor] = {}
    halves: set[str] = set()
    for weight in graph.initializer:
        constants[weight.name] = _tensor(weight, f"weight {weight.name}", where)
        if weight.data_type == FLOAT16:
            halves.add(weight.name)
    image, shape, batch = _image(graph, set(constants), where)
    nodes = tuple(_nodes(graph, opset, settings, constants, halves, where))
    if len(graph.output) != 1:
        raise _foreign(f"it has {len(graph.output)} outputs", where)
    made = {graph.output[0].name} & {image, *constants, *(name for node in nodes for name in node.outputs)}
    if not made:
        raise _foreign(f"nothing in it makes its output {graph.output[0].name}", where)
    return Program(nodes, constants, frozenset(halves), image, shape, batch, graph.output[0].name, settings, opset)


def _foreign(reason: str, where: str) -> ArtifactError:
    return ArtifactError(
        f"the importer cannot read this graph: {reason}",
        where=where,
        fix="export one float32 input (N, C, H, W) of fixed C, H, W and one output of logits (N, K)",
    )


def _opset(model: Any, where: str) -> int:
    found = [int(entry.version) for entry in model.opset_import if entry.domain in _DOMAINS]
    if not found or found[0] not in OPSETS:
        stated = f"opset {found[0]}" if found else "no opset of the ONNX standard"
        raise ArtifactError(
            f"the importer covers opsets {OPSETS.start} to {OPSETS.stop - 1}; this file has {stated}",
            where=where,
            fix="export it with opset 18 or 20, or convert it with onnx.version_converter",
        )
    return found[0]


def _image(graph: Any, weights: set[str], where: str) -> tuple[str, tuple[int, int, int], int | None]:
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise _foreign(f"it has {len(inputs)} inputs", where)
    kind = inputs[0].type.tensor_type
    sizes = [int(dim.dim_value) for dim in kind.shape.dim]  # 0 where it is free
    if kind.elem_type != 1 or len(sizes) != 4 or min(sizes[1:]) < 1:
        raise _foreign(f"its input {inputs[0].name} is not float32 (N, C, H, W)", where)
    return inputs[0].name, (sizes[1], sizes[2], sizes[3]), sizes[0] or None


def _nodes(
    graph: Any, opset: int, settings: Settings, constants: dict[str, Tensor], halves: set[str], where: str
) -> Iterator[Node]:
    for proto in graph.node:
        name = proto.name or (proto.output[0] if proto.output else proto.op_type)
        attributes = {a.name: _value(a, proto.op_type, name, opset, where) for a in proto.attribute}
        if proto.op_type == "Constant" and proto.domain in _DOMAINS:
            constants[proto.output[0]] = _constant(attributes, name, opset)
            if any(a.name == "value" and a.t.data_type == FLOAT16 for a in proto.attribute):
                halves.add(proto.output[0])
            continue
        if proto.domain not in _DOMAINS:
            raise uncovered(f"{proto.domain}.{proto.op_type}", name, opset, "it is not part of the ONNX standard")
        if proto.op_type not in OPERATORS:
            raise uncovered(proto.op_type, name, opset, "the operator is not known to it")
        for attribute in attributes:
            if attribute not in OPERATORS[proto.op_type].attributes:
                raise uncovered(proto.op_type, name, opset, f"attribute {attribute}")
        half = _is_half(proto, attributes, halves)
        if half:
            halves.update(proto.output)
        yield Node(proto.op_type, name, opset, tuple(proto.input), tuple(proto.output), attributes, half, settings)


def _is_half(proto: Any, attributes: dict[str, Any], halves: set[str]) -> bool:
    if proto.op_type == "Cast":
        return attributes.get("to") == FLOAT16
    if proto.op_type == "QuantizeLinear":
        return False
    if proto.op_type == "ConstantOfShape":
        return any(a.name == "value" and a.t.data_type == FLOAT16 for a in proto.attribute)
    if proto.op_type == "DequantizeLinear" and attributes.get("output_dtype"):
        return bool(attributes["output_dtype"] == FLOAT16)
    place = _LIKE.get(proto.op_type, 0)
    return len(proto.input) > place and proto.input[place] in halves


def _value(attribute: Any, op: str, name: str, opset: int, where: str) -> Any:
    """An attribute as plain Python, or a tensor."""
    from onnx import AttributeProto, helper

    if attribute.type == AttributeProto.TENSOR:
        return _tensor(attribute.t, f"attribute {attribute.name} of node {name}", where)
    plain = ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS")
    if attribute.type not in [getattr(AttributeProto, kind) for kind in plain]:
        raise uncovered(op, name, opset, f"attribute {attribute.name} holds a graph or another structure")
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _constant(attributes: dict[str, Any], name: str, opset: int) -> Tensor:
    for key, kind in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in attributes:
            return torch.from_numpy(np.array(attributes[key], kind))
    found = attributes.get("value")
    if not isinstance(found, Tensor):
        raise uncovered("Constant", name, opset, f"a value given as {', '.join(attributes) or 'nothing'}")
    return found


def _tensor(proto: Any, what: str, where: str) -> Tensor:
    from onnx import TensorProto, numpy_helper

    kind = TensorProto.DataType.Name(proto.data_type)
    if kind == "FLOAT16":
        return torch.from_numpy(numpy_helper.to_array(proto).astype(np.float32))
    if kind not in _HELD:
        raise _foreign(f"{what} is {kind}", where)
    try:
        return torch.from_numpy(np.array(numpy_helper.to_array(proto)))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{what} is damaged: {error}", where=where, fix="copy or export the file again") from error


def as_scores(program: Program) -> Program:
    """The same program with the logarithm of its probabilities, where it ends in a softmax.

    They differ from the logits by a constant in each row, so nothing an attack does with logits is lost.
    """
    nodes, wanted = list(program.nodes), program.scores
    for place in reversed(range(len(nodes))):
        node = nodes[place]
        if wanted not in node.outputs:
            continue
        if node.op in _PASSING:
            wanted = node.inputs[0]
            continue
        if node.op == "Softmax":
            from dataclasses import replace

            nodes[place] = replace(node, op="LogSoftmax")
        break
    return Program(**{**vars(program), "nodes": tuple(nodes)})
