"""Hold a lowered graph against the fp32 graph, number by number: what images may not show, arithmetic does.

An output channel that is zero, swapped or scaled twice can move the logits of a trained network by less than correct
rounding to int8 does, and no gate on logits tells the two apart. Here nothing is tolerated but rounding: a weight lies
within half a step of its scale, an fp16 number within its last digit, and the scale of an activation is the one that
its range asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from robustkd.errors import NumericsError
from robustkd.exporting.graphs import consumers, producers, title, weights
from robustkd.exporting.ranges import Range

_DIGIT, _SUBNORMAL = 2.0**-10, 2.0**-24
"""Of an fp16 number: twice its relative rounding error, and the absolute one where it has no normal form."""
_EXACT = 1e-6
"""Relative: float32 arithmetic on the way."""
_SCALE = 0.02
"""How far a scale may be from the range's: quantizers spread it over 254, 255 or 256 steps."""
_TINY = 1e-6
"""A tensor that varies by less has a scale that means nothing."""


class Held(BaseModel, frozen=True, extra="forbid"):
    """What was compared."""

    constants: int = Field(description="constant tensors of the fp32 graph found again")
    scales: int = Field(description="activations whose scale is that of their range")
    largest_error: float = Field(description="largest error of a number, as a share of what rounding allows it")


class _Numbers(NamedTuple):
    """Values of a constant in double precision, and what rounding may have done to each."""

    values: NDArray[np.float64]
    slack: NDArray[np.float64]


def hold(source: Any, made: Any, ranges: Mapping[str, Range] | None = None) -> Held:
    """Compare nodes, constants and scales of a lowered graph with the fp32 graph it was made from.

    Args:
        source: the fp32 graph, every node named.
        made: the same in another precision.
        ranges: of each quantized activation; left out, scales are not compared.

    Raises:
        NumericsError: a node is gone or has other attributes, or a number is not what rounding makes of the original.
    """
    import onnx

    constants, there = weights(source.graph), {node.name: node for node in made.graph.node}
    before, writer = _Graph(made), producers(source.graph)
    count, worst = 0, 0.0
    for node in source.graph.node:
        same = there.get(node.name)
        feeds = writer.get(node.input[0]) if same is None and node.op_type in ("Relu", "Clip") else None
        if feeds is not None and before.quantizes(there.get(feeds.name)):
            continue  # its work is done by quantizing, whose range ends where the activation cuts
        if same is None or (same.op_type, _settings(same)) != (node.op_type, _settings(node)):
            raise _broken(f"{title(node)} is not in it as it was", node)
        for name, now in zip(node.input, same.input, strict=True):
            if name in constants:
                worst = max(worst, _error(onnx.numpy_helper.to_array(constants[name]), before.numbers(now), node, name))
                count += 1
    return Held(constants=count, scales=0 if ranges is None else _scales(before, ranges), largest_error=worst)


def _settings(node: Any) -> list[bytes]:
    """Attributes, without types and tensors, which follow the precision."""
    return sorted(a.SerializeToString(deterministic=True) for a in node.attribute if not a.HasField("t") and a.name != "to")


def _error(want: NDArray[Any], found: _Numbers | None, node: Any, name: str) -> float:
    if found is None or found.values.shape != want.shape:
        raise _broken(f"its constant {name} is no longer one, or has another shape", node)
    wide = want.astype(np.float64)
    slack = found.slack + _EXACT * np.abs(wide)
    off = np.abs(found.values - wide)
    wrong = ~(off <= slack)  # also where it is not a number
    if wrong.any():
        raise _broken(f"{int(wrong.sum())} of {want.size} numbers of {name} are not what rounding makes of them", node)
    return float((off[slack > 0] / slack[slack > 0]).max(initial=0.0))


class _Graph:
    """A lowered graph, its constants seen through the nodes that quantizing and halving put before them."""

    def __init__(self, model: Any) -> None:
        self.nodes = model.graph.node
        self._fixed, self._made, self._readers = weights(model.graph), producers(model.graph), consumers(model.graph)

    def array(self, name: str) -> NDArray[Any]:
        import onnx

        found: NDArray[Any] = onnx.numpy_helper.to_array(self._fixed[name])
        return found

    def numbers(self, name: str) -> _Numbers | None:
        """None where it depends on the images."""
        node = self._made.get(name)
        if name in self._fixed:
            array = self.array(name)
            wide = array.astype(np.float64)
            return _Numbers(wide, _half(wide) if array.dtype == np.float16 else np.zeros_like(wide))
        if node is None or node.op_type not in ("DequantizeLinear", "Cast"):
            return None
        if node.op_type == "Cast":
            inner = self.numbers(node.input[0])
            return inner and _Numbers(inner.values, inner.slack + _half(inner.values))
        return self._dequantized(node) if node.input[0] in self._fixed else None

    def _dequantized(self, node: Any) -> _Numbers:
        whole = self.array(node.input[0]).astype(np.float64)
        scale = self.array(node.input[1])
        zero = self.array(node.input[2]).astype(np.float64) if len(node.input) > 2 and node.input[2] else np.zeros(())
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        view = [-1 if place == axis % whole.ndim else 1 for place in range(whole.ndim)] if scale.ndim and whole.ndim else []
        step = scale.astype(np.float64).reshape(view) if view else scale.astype(np.float64).reshape(())
        values = (whole - (zero.reshape(view) if zero.ndim and view else zero)) * step
        if scale.dtype == np.float16:  # rounded once to int8, and once more where the scale had to be raised to fp16
            return _Numbers(values, np.broadcast_to(step, whole.shape) + _half(values))
        return _Numbers(values, np.broadcast_to(0.501 * step, whole.shape))

    def origin(self, name: str) -> str:
        """The tensor before a change of type."""
        node = self._made.get(name)
        return self.origin(node.input[0]) if node is not None and node.op_type == "Cast" else name

    def quantizes(self, node: Any) -> bool:
        """Whether what a node writes is read by QuantizeLinear alone."""
        readers = [] if node is None else self._readers.get(node.output[0], [])
        return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)

    def of_images(self, name: str) -> bool:
        return self.numbers(name) is None


def _half(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(values) * _DIGIT + _SUBNORMAL


def _scales(graph: _Graph, ranges: Mapping[str, Range]) -> int:
    """How many activations have the scale and zero point of their range."""
    count = 0
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or not graph.of_images(node.input[0]):
            continue
        name = graph.origin(node.input[0])
        if name not in ranges:
            raise _broken(f"{name} is quantized and was not calibrated", node)
        low, high = min(ranges[name][0], 0.0), max(ranges[name][1], 0.0)
        count += 1
        if high - low < _TINY:
            continue
        scale, zero = graph.array(node.input[1]), graph.array(node.input[2])
        slack = _SUBNORMAL if scale.dtype == np.float16 else 0.0
        signed = zero.dtype == np.int8
        wanted = 2 * max(-low, high) / 255 if signed else (high - low) / 255
        offset = 0.0 if signed else -low / wanted
        if not abs(float(scale) - wanted) <= _SCALE * wanted + slack or abs(float(zero) - offset) > 1:
            raise _broken(f"the scale {float(scale):.4g} of {name} is not that of its range {low:.4g} to {high:.4g}", node)
    return count


def _broken(what: str, node: Any) -> NumericsError:
    return NumericsError(
        f"the graph in lower precision is not the one it was made from: {what}",
        where=title(node),
        fix="keep this node in float32 with --keep-fp32; if that does not help, report it with the file",
    )
