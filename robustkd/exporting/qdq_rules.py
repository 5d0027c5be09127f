"""The linter of quantized graphs: each rule names the node that breaks it, before a parser on a device does.

Rules of the profile `trt` were found with TensorRT-RTX's parser and in the vendor's documents: a graph that breaks
one is refused there, or built without the integer kernels it was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from robustkd.errors import ArtifactError
from robustkd.exporting.graphs import consumers, producers, title, weights
from robustkd.recipe.target import Int8Profile


class Finding(NamedTuple):
    """A node, the rule it breaks, and what was found."""

    node: str
    rule: str
    found: str


@dataclass(frozen=True)
class _Graph:
    """A graph and where its tensors come from and go to."""

    graph: Any
    opset: int
    made: dict[str, Any]
    readers: dict[str, list[Any]]
    fixed: dict[str, Any]

    def nodes(self, *kinds: str) -> Iterator[Any]:
        return (node for node in self.graph.node if node.op_type in kinds)

    def value(self, name: str) -> Any:
        """The array of a constant tensor, or None."""
        import onnx

        return onnx.numpy_helper.to_array(self.fixed[name]) if name in self.fixed else None

    def is_weight(self, node: Any) -> bool:
        """Whether a Q or DQ works on a constant."""
        return node.input[0] in self.fixed or self._pair_on_constant(node)

    def _pair_on_constant(self, node: Any) -> bool:
        before = self.made.get(node.input[0])
        return before is not None and before.op_type == "QuantizeLinear" and before.input[0] in self.fixed


Rule = Callable[[_Graph], Iterator[Finding]]


def lint(model: Any, profile: Int8Profile) -> list[Finding]:
    """Every broken rule of the profile, in the order of the rules; empty where the graph is as it should be."""
    graph = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    seen = _Graph(graph, opset, producers(graph), consumers(graph), weights(graph))
    return [finding for rule in (*_COMMON, *(_TRT if profile == "trt" else _CPU)) for finding in rule(seen)]


def check(model: Any, profile: Int8Profile, *, where: str = "") -> None:
    """Raise on the first broken rule.

    Raises:
        ArtifactError: the graph breaks a rule; the message names the node and the rule, and says how many more there are.
    """
    findings = lint(model, profile)
    if findings:
        first = findings[0]
        more = f" ({len(findings) - 1} more)" if len(findings) > 1 else ""
        raise ArtifactError(
            f"{first.node} breaks the rule {first.rule} of int8 for {profile}: {first.found}{more}",
            where=where or first.node,
            fix="quantize with `robustkd export --precision int8`, or keep the node in float: --keep-fp32",
        )


def _paired(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("QuantizeLinear"):
        after = g.readers.get(node.output[0], [])
        if not after or any(reader.op_type != "DequantizeLinear" for reader in after):
            yield Finding(title(node), "pairs", "what it quantizes is not read by DequantizeLinear alone")
    for node in g.nodes("DequantizeLinear"):
        before = g.made.get(node.input[0])
        if node.input[0] not in g.fixed and (before is None or before.op_type != "QuantizeLinear"):
            yield Finding(title(node), "pairs", "what it reads is neither constant nor written by QuantizeLinear")


def _scales(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("QuantizeLinear", "DequantizeLinear"):
        scale = g.value(node.input[1])
        if scale is None:
            yield Finding(title(node), "scale", "its scale is not a constant")
        elif not np.isfinite(scale).all() or (scale <= 0).any():
            yield Finding(title(node), "scale", "a scale is not a positive number")
        elif scale.dtype == np.float16 and g.opset < 19:
            yield Finding(title(node), "scale", f"fp16 scales need opset 19, the graph has {g.opset}")


def _matching(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("DequantizeLinear"):
        before = g.made.get(node.input[0])
        if before is None or before.op_type != "QuantizeLinear":
            continue
        for place, what in ((1, "scale"), (2, "zero point")):
            here, there = (n.input[place] if len(n.input) > place else "" for n in (node, before))
            same = here == there or np.array_equal(g.value(here), g.value(there))
            if not same:
                yield Finding(title(node), "matching pairs", f"its {what} is not that of {title(before)}")


def _logits(g: _Graph) -> Iterator[Finding]:
    for value in g.graph.output:
        node = g.made.get(value.name)
        while node is not None and node.op_type in ("Cast", "Reshape", "Flatten", "Identity"):
            node = g.made.get(node.input[0])
        if node is not None and node.op_type == "DequantizeLinear":
            yield Finding(
                title(node), "float logits", f"the output {value.name} is quantized: logits tie and attacks on margins end"
            )


def _ends(g: _Graph) -> Iterator[Finding]:
    import onnx

    for value in (*g.graph.input, *g.graph.output):
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT and value.name not in g.fixed:
            yield Finding(value.name, "float ends", "images enter and logits leave in float32")


def _symmetric(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("QuantizeLinear", "DequantizeLinear"):
        zero = g.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is None:
            if len(node.input) > 2 and node.input[2]:
                yield Finding(title(node), "zero point", "its zero point is not a constant")
            elif node.op_type == "QuantizeLinear":
                yield Finding(title(node), "signed", "without a zero point it makes uint8; TensorRT takes int8 only")
            continue
        if zero.dtype != np.int8:
            yield Finding(title(node), "signed", f"it is {zero.dtype}; TensorRT takes int8 only")
        elif zero.any():
            yield Finding(title(node), "zero point", "its zero point is not 0")


def _float_bias(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("Conv", "Gemm", "ConvTranspose"):
        before = g.made.get(node.input[2]) if len(node.input) > 2 else None
        if before is not None and before.op_type == "DequantizeLinear":
            yield Finding(title(node), "float bias", "its bias is quantized")


def _granularity(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("QuantizeLinear", "DequantizeLinear"):
        scale = g.value(node.input[1])
        if scale is None:
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        of_conv = any(reader.op_type == "Conv" for reader in g.readers.get(node.output[0], []))
        if not g.is_weight(node):
            if scale.size > 1:
                yield Finding(title(node), "activations per tensor", f"it has {scale.size} scales")
        elif node.op_type == "DequantizeLinear" and of_conv and (scale.ndim == 0 or (scale.size > 1 and axis != 0)):
            yield Finding(title(node), "weights per channel", "the weight of a convolution has no scale per output channel")


def _fusible(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("Conv"):
        for reader in g.readers.get(node.output[0], []):
            if reader.op_type != "QuantizeLinear":
                continue
            for inner in g.readers.get(reader.output[0], []):
                for after in g.readers.get(inner.output[0], []):
                    if after.op_type in ("Relu", "Clip"):
                        yield Finding(
                            title(reader), "activation after convolution", f"it stands between {title(node)} and {title(after)}"
                        )


def _skips(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("Add"):
        before = [g.made.get(name) for name in node.input]
        if sum(b is not None and b.op_type == "DequantizeLinear" for b in before) == 2:
            yield Finding(title(node), "residual sum", "both inputs are quantized; only the skip may be, or it cannot fuse")


def _float_classifier(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("Gemm", "MatMul", "GlobalAveragePool", "ReduceMean"):
        for name in node.input:
            before = g.made.get(name)
            if before is not None and before.op_type == "DequantizeLinear":
                yield Finding(
                    title(node), "float classifier", f"its input {name} is quantized; pooling and classifier stay in float"
                )
                break


def _integer_bias(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("Conv", "Gemm"):
        if len(node.input) < 3:
            continue
        data, weight, bias = (name in g.made and g.made[name].op_type == "DequantizeLinear" for name in node.input[:3])
        if data and weight and not bias:
            yield Finding(
                title(node), "integer bias", "input and weight are quantized, the bias is not: no integer kernel takes it"
            )


def _unsigned(g: _Graph) -> Iterator[Finding]:
    for node in g.nodes("QuantizeLinear"):
        zero = g.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.uint8(0)
        if zero is None or zero.dtype != np.uint8:
            kind = "not constant" if zero is None else str(zero.dtype)
            yield Finding(
                title(node), "unsigned activations", f"its zero point is {kind}; ONNX Runtime's fast kernels want uint8"
            )


_COMMON: tuple[Rule, ...] = (_ends, _paired, _scales, _matching, _logits)
_TRT: tuple[Rule, ...] = (_symmetric, _float_bias, _granularity, _fusible, _skips, _float_classifier)
_CPU: tuple[Rule, ...] = (_unsigned, _integer_bias)
