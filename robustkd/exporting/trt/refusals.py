"""What TensorRT refuses, in words that say which rule of the graph is broken and what mends it.

The patterns are parts of messages seen with TensorRT-RTX 1.7; the parser of classic TensorRT is the same open source.
"""

from __future__ import annotations

from typing import NamedTuple

from robustkd.engines._plan import PlanKind
from robustkd.engines._tensorrt import FAMILIES
from robustkd.errors import ArtifactError, NumericsError, RequirementError, RobustKDError

_INT8 = "export it again with --int8-profile trt: int8, zero points 0, float bias"


class Rule(NamedTuple):
    """A pattern in a message, what it means, what mends it, and whether the graph or the machine is at fault."""

    pattern: str
    what: str
    fix: str
    error: type[RobustKDError] = ArtifactError


RULES = (
    Rule("shiftIsAllZeros", "a zero point that is not 0: TensorRT quantises symmetrically", _INT8),
    Rule("input has type Int32 but must have type", "an int32 bias behind DequantizeLinear: TensorRT wants float", _INT8),
    Rule(
        "no optimization profile has been defined",
        "the batch is free and no batch sizes are given",
        "give --batch 1:8:64",
    ),
    Rule(
        "FP32 GEMM is not supported",
        "Turing (sm75) has no float32 matrix product in TensorRT-RTX",
        "leave sm75 out, or export with --precision fp16",
        RequirementError,
    ),
    Rule(
        "Plugin not found",
        "an operator that TensorRT does not have",
        "export it with robustkd, or write the graph with standard operators",
    ),
    Rule("Unsupported ONNX data type", "a data type that TensorRT does not have", "export it with robustkd"),
    Rule(
        "hardware-specific data type",
        "a data type that not all GPUs named have",
        "use int8 or fp16, or name newer GPUs",
        RequirementError,
    ),
    Rule(
        "generateForCurrent",
        "building for the GPU of this machine needs its driver, which is missing",
        "name GPUs instead: --rtx --target sm86,sm89",
        RequirementError,
    ),
    Rule(
        "OutOfMemory",
        "the device has too little memory for the build",
        "lower engine.workspace_mib (--set) or the largest --batch",
        RequirementError,
    ),
    Rule(
        "Could not find any implementation",
        "no kernel of this device fits a layer",
        "raise engine.workspace_mib (--set), or another --precision",
        RequirementError,
    ),
    Rule(
        "CUDA driver version is insufficient",
        "the NVIDIA driver is missing or too old",
        "update the driver, or build on the device",
        RequirementError,
    ),
)
_UINT8 = "UINT8 zero_point only on DLA"


def refusal(kind: PlanKind, messages: list[str], where: str) -> RobustKDError:
    """The error for a graph or option that the library refuses: the first known cause, else its own words."""
    title = FAMILIES[kind].title
    for message in messages:
        for rule in RULES:
            if rule.pattern in message:
                return rule.error(f"{title} refuses the graph: {rule.what}", where=where, fix=rule.fix)
    said = messages[0].strip().splitlines()[0][:300] if messages else "it gives no reason"
    return RequirementError(
        f"{title} refuses the graph: {said}", where=where, fix="export another --precision or --opset, or another version of it"
    )


def silently_wrong(warnings: list[str], kind: PlanKind, where: str) -> NumericsError | None:
    """The error for a graph that the library takes for another one: it reads uint8 tensors of zero point 0 as int8."""
    if any(_UINT8 in line for line in warnings):
        return NumericsError(
            f"{FAMILIES[kind].title} reads a uint8 tensor as int8, which computes another function", where=where, fix=_INT8
        )
    return None


def no_graph(where: str, reason: str) -> ArtifactError:
    """The error for a file that is no ONNX graph with its weights inside."""
    return ArtifactError(f"no engine can be built from this file: {reason}", where=where, fix="export or copy it again")
