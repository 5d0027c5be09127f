"""Half precision inside the graph: fp16 weights and arithmetic, float32 images in and float32 logits out.

Float32 at both ends keeps the eps ball exact: a pixel rounded to fp16 moves by up to 2.4e-4, 0.8 % of 8/255.
Works on graphs with QuantizeLinear and DequantizeLinear too (int8 with an fp16 rest): their scales become fp16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from robustkd.errors import NumericsError
from robustkd.exporting.graphs import consumers, inferred, title, weights, without_orphans

LARGEST = 65504.0
SMALLEST = 2.0**-14
"""The smallest normal number of fp16: a smaller scale would lose its digits, or become 0."""

#: inputs that the standard wants in float32 whatever the rest is
_ALWAYS_FLOAT = {"Resize": {2}}


def to_half(model: Any, keep: Iterable[str] = ()) -> Any:
    """A copy of the model that computes in fp16, except the nodes named.

    Raises:
        NumericsError: a weight is beyond the range of fp16.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy = inferred(copy)
    _raise_scales(copy.graph)
    _Halving(copy.graph, set(keep)).run()
    return inferred(without_orphans(copy))


class _Halving:
    """One pass over the nodes in order; casts are written just before they are first needed."""

    def __init__(self, graph: Any, keep: set[str]) -> None:
        import onnx

        self.graph, self.keep, self.onnx = graph, keep, onnx
        self.types = onnx.TensorProto
        self.constants = weights(graph)
        told = [*graph.value_info, *graph.input, *graph.output]
        self.floats = {v.name for v in told if v.type.tensor_type.elem_type == self.types.FLOAT}
        self.floats |= {name for name, tensor in self.constants.items() if tensor.data_type == self.types.FLOAT}
        self.home = {value.name: self.types.FLOAT for value in graph.input}
        self.made: dict[tuple[str, int], str] = {}
        self.nodes: list[Any] = []

    def run(self) -> None:
        for node in self.graph.node:
            half = node.name not in self.keep
            always = _ALWAYS_FLOAT.get(node.op_type, set())
            for place, name in enumerate(node.input):
                if name in self.floats:
                    wanted = self.types.FLOAT16 if half and place not in always else self.types.FLOAT
                    node.input[place] = self._as(name, wanted, node)
            if half:
                self._attributes(node)
            self.home |= {name: self.types.FLOAT16 if half else self.types.FLOAT for name in node.output}
            self.nodes.append(node)
        self._ends()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _as(self, name: str, kind: int, node: Any) -> str:
        """The name under which a float tensor is to be had in the type wanted."""
        if name in self.constants:
            return self._constant(name, kind, node)
        if self.home.get(name, self.types.FLOAT) == kind:
            return name
        if (name, kind) not in self.made:
            self.made[name, kind] = self._cast(name, f"{name}_{'fp16' if kind == self.types.FLOAT16 else 'fp32'}", kind)
        return self.made[name, kind]

    def _constant(self, name: str, kind: int, node: Any) -> str:
        if kind == self.types.FLOAT:
            return name
        if (name, kind) not in self.made:
            values = self.onnx.numpy_helper.to_array(self.constants[name])
            tensor = self.onnx.numpy_helper.from_array(_halved(values, title(node)), f"{name}_fp16")
            self.graph.initializer.append(tensor)
            self.made[name, kind] = tensor.name
        return self.made[name, kind]

    def _cast(self, source: str, target: str, kind: int) -> str:
        self.nodes.append(self.onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind))
        return target

    def _attributes(self, node: Any) -> None:
        """Types and tensors that a node carries itself."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.types.FLOAT:
                attribute.i = self.types.FLOAT16
            elif attribute.HasField("t") and attribute.t.data_type == self.types.FLOAT:
                values = self.onnx.numpy_helper.to_array(attribute.t)
                attribute.t.CopyFrom(self.onnx.numpy_helper.from_array(_halved(values, title(node)), attribute.t.name))

    def _ends(self) -> None:
        """Outputs leave in float32 under their own names."""
        for value in self.graph.output:
            if value.name not in self.floats or self.home.get(value.name) != self.types.FLOAT16:
                continue
            inner = f"{value.name}_fp16"
            for node in self.nodes:
                for names in (node.input, node.output):
                    for place, name in enumerate(names):
                        if name == value.name:
                            names[place] = inner
            self._cast(inner, value.name, self.types.FLOAT)


def _halved(values: Any, where: str) -> Any:
    largest = float(np.abs(values).max(initial=0.0))
    if largest > LARGEST:
        raise NumericsError(
            f"a weight of {largest:.3g} is beyond fp16, whose largest number is {LARGEST:g}",
            where=where,
            fix=f"keep this node in float32: --keep-fp32 {where}",
        )
    return values.astype(np.float16)


def _raise_scales(graph: Any) -> None:
    """Bring scales below the normal range of fp16 up to it, and the integers behind them down, before they are rounded to 0.

    What this moves a weight by is at most half of `SMALLEST`.
    """
    import onnx

    constants, readers = weights(graph), consumers(graph)
    for node in graph.node:
        scale = constants.get(node.input[1]) if node.op_type == "DequantizeLinear" else None
        whole = constants.get(node.input[0]) if scale is not None else None
        if scale is None or whole is None or len(readers[whole.name]) > 1:
            continue
        scales = onnx.numpy_helper.to_array(scale)
        raised = np.maximum(scales, np.float32(SMALLEST))
        if (raised == scales).all():
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        numbers = onnx.numpy_helper.to_array(whole)
        shape = [-1 if place == axis % numbers.ndim else 1 for place in range(numbers.ndim)] if scales.ndim else []
        ratio = (scales / raised).reshape(shape) if scales.ndim else scales / raised
        whole.CopyFrom(onnx.numpy_helper.from_array(np.rint(numbers * ratio).astype(numbers.dtype), whole.name))
        scale.CopyFrom(onnx.numpy_helper.from_array(raised, scale.name))
