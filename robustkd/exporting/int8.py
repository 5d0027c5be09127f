"""int8 in the graph: QuantizeLinear and DequantizeLinear around what is to run in integers, in two placements.

`trt`: what TensorRT takes and fuses. Signed, zero point 0, weights per output channel, activations per tensor, QDQ on
the inputs of convolutions and on the skip input of a residual sum; bias, pooling, classifier and logits in float.
`ort-cpu`: what ONNX Runtime runs fastest on a CPU. Unsigned activations with a zero point, which absorb the ReLU,
signed weights, int32 bias, every operator that has an integer kernel; the logits in float.

Placement and arithmetic are ONNX Runtime's quantizer; ranges and rules are ours (`ranges`, `qdq_rules`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from robustkd.errors import RequirementError
from robustkd.exporting.graphs import consumers, inferred, producers, weights, without_orphans
from robustkd.exporting.ranges import Range
from robustkd.recipe.target import Int8Profile

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Operators that hold weights: the layers whose sensitivity is reported."""

_CPU = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "GlobalAveragePool", "AveragePool", "MaxPool", "Concat")
_TYPES: dict[str, tuple[str, ...]] = {"trt": ("Conv",), "ort-cpu": _CPU}


def quantize(
    model: Any,
    ranges: Mapping[str, Range],
    profile: Int8Profile,
    *,
    keep: Iterable[str] = (),
    only: Iterable[str] = (),
    infer: bool = True,
) -> Any:
    """A copy of the fp32 model with QDQ pairs in the placement of the profile.

    Args:
        model: the fp32 graph, with types inferred and every node named.
        ranges: of every float tensor, as `ranges.measure` returns them.
        profile: `trt` or `ort-cpu`.
        keep: names of nodes that stay in float.
        only: names of the nodes to quantize; left out, all that the profile quantizes.
        infer: infer the types of the new graph; a later pass needs them, running it does not.

    Raises:
        RequirementError: ONNX Runtime is missing, or its quantizer is another than the one known here.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType
    except ImportError as error:
        raise RequirementError(
            "int8 needs the quantizer of ONNX Runtime", where=str(error), fix="pip install 'onnxruntime>=1.20'"
        ) from error
    every = full_ranges(copy, ranges)
    told = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in every.items()}
    kept = {*keep, *(_classifier(copy) if profile == "trt" else ())}
    with _quiet():
        quantizer = QDQQuantizer(
            copy,
            True,  # per channel
            False,  # 8 bits, not 7
            QuantType.QInt8,
            QuantType.QInt8 if profile == "trt" else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, told),
            [*only],
            [*kept],
            [*_TYPES[profile]],
            _options(profile),
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made = quantizer.model.model
    made = without_orphans(made if profile == "trt" else _float_logits(made))
    return inferred(made) if infer else made


def _options(profile: Int8Profile) -> dict[str, Any]:
    if profile == "ort-cpu":
        return {"ActivationSymmetric": False, "WeightSymmetric": True}
    return {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,  # TensorRT's parser rejects an int32 bias
        "OpTypesToExcludeOutputQuantization": ["Conv"],
    }


def layers(model: Any, profile: Int8Profile) -> list[Any]:
    """The weighted nodes of an fp32 graph that the profile quantizes."""
    last = set(_classifier(model)) if profile == "trt" else set()
    return [n for n in model.graph.node if n.op_type in _TYPES[profile] and n.op_type in WEIGHTED and n.name not in last]


def tensors(model: Any, profile: Int8Profile) -> list[str]:
    """The tensors whose range the profile needs, in the order of the graph."""
    fixed = weights(model.graph)
    wanted = [n for n in model.graph.node if n.op_type in _TYPES[profile]]
    touched = [name for node in wanted for name in (*node.input, *(node.output if profile == "ort-cpu" else ()))]
    absorbed = _absorbed(model, dict.fromkeys(touched, (0.0, 0.0)))
    return [name for name in dict.fromkeys(touched) if name and name not in fixed and name not in absorbed]


def full_ranges(model: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges measured, and those that follow from them: of tensors that only an activation reads."""
    return {**_absorbed(model, ranges), **ranges}


def _absorbed(model: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """What only an activation reads is as wide as what the activation lets through: their quantized forms are equal."""
    readers = consumers(model.graph)
    return {
        node.input[0]: ranges[node.output[0]]
        for node in model.graph.node
        if node.op_type in ("Relu", "Clip") and node.output[0] in ranges and len(readers[node.input[0]]) == 1
    }


def _classifier(model: Any) -> list[str]:
    """The node that writes the logits: quantized logits tie, flip and end every attack on margins."""
    made = producers(model.graph)
    return [made[value.name].name for value in model.graph.output if value.name in made]


def _float_logits(model: Any) -> Any:
    """Let the logits leave before they are quantized; what quantized them is dropped."""
    graph = model.graph
    made = producers(graph)
    for value in graph.output:
        dequantize = made.get(value.name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantizing = made[dequantize.input[0]]
        source = made[quantizing.input[0]]
        place = [*source.output].index(quantizing.input[0])
        graph.node.remove(dequantize)
        graph.node.remove(quantizing)
        source.output[place] = value.name
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer speaks through the root logger, and would give it a handler on stderr."""
    root = logging.getLogger()
    before, level = [*root.handlers], root.level
    silent = logging.NullHandler()
    root.addHandler(silent)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = before
