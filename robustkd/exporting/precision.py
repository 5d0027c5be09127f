"""From the fp32 graph to the precision of a target: precision lives in the graph, never in a builder's flags."""

from __future__ import annotations

from typing import Any, NamedTuple

from robustkd.engines._onnx_file import PREFIX
from robustkd.exporting.calibration import Calibrated
from robustkd.exporting.graphs import find_nodes, inferred, named, weights
from robustkd.exporting.half import to_half
from robustkd.exporting.held import hold
from robustkd.exporting.int8 import full_ranges, layers, quantize, tensors
from robustkd.exporting.qdq_rules import check
from robustkd.exporting.ranges import Range, measure
from robustkd.exporting.sensitivity import SHOWN, sensitivity
from robustkd.recipe.target import Target


class Lowered(NamedTuple):
    """A graph in its precision.

    Attributes:
        model: the ModelProto.
        facts: for the manifest: what was quantized, what was kept, the most sensitive layers, what was held against fp32.
        table: for calibration.json; None where nothing was calibrated.
    """

    model: Any
    facts: dict[str, Any]
    table: dict[str, Any] | None


def lower(model: Any, target: Target, calibrated: Calibrated | None = None) -> Lowered:
    """The graph in the target's precision; the fp32 model given is left as it is.

    Args:
        model: the fp32 graph.
        target: precision, int8 profile, nodes to keep.
        calibrated: the calibration images; needed for int8.

    Raises:
        ConfigError: a node to keep is not in the graph.
        ArtifactError: the calibration images do not fit, or the quantized graph breaks a rule of its profile.
        NumericsError: a weight or a value has no place in the precision, or is not what rounding makes of it.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    source = named(inferred(copy))
    keep = find_nodes(source, target.keep_fp32)
    facts: dict[str, Any] = {"kept": list(keep)}
    made, table, ranges = source, None, None
    if target.quantized:
        if calibrated is None:
            raise ValueError("int8 needs calibration images")
        ranges = measure(source, calibrated.images, target.calibration, tensors(source, target.int8_profile))
        made, told, table = _int8(source, target, calibrated, keep, ranges)
        facts |= told
    if target.precision in ("fp16", "int8-fp16"):
        made = to_half(made, keep)
        if target.quantized:
            check(made, target.int8_profile)
    facts["held"] = hold(source, made, None if ranges is None else full_ranges(source, ranges)).model_dump()
    _state(made, target)
    onnx.checker.check_model(made, full_check=True)
    return Lowered(made, facts, table)


def _int8(
    source: Any, target: Target, calibrated: Calibrated, keep: tuple[str, ...], ranges: dict[str, Range]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    profile = target.int8_profile
    made = quantize(source, ranges, profile, keep=keep)
    check(made, profile)
    found = sensitivity(source, ranges, profile, calibrated.images, keep)
    quantized = [node.name for node in layers(source, profile) if node.name not in keep]
    facts = {
        "profile": profile,
        "layers": len(quantized),
        "sensitive": [layer.model_dump() for layer in found[:SHOWN]],
    }
    table = {
        "schema": "robustkd.calibration/1",
        "profile": profile,
        **calibrated.record,
        "tensors": _tensors(made, full_ranges(source, ranges)),
        "sensitivity": [layer.model_dump() for layer in found],
    }
    return made, facts, table


def _tensors(model: Any, ranges: dict[str, Range]) -> dict[str, Any]:
    """Range, scale and zero point of every quantized activation."""
    import onnx

    fixed = weights(model.graph)
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in fixed:
            scale, zero = (onnx.numpy_helper.to_array(fixed[name]) for name in node.input[1:3])
            low, high = ranges[node.input[0]]
            found[node.input[0]] = {"low": low, "high": high, "scale": float(scale), "zero_point": int(zero)}
    return found


def _state(model: Any, target: Target) -> None:
    """Let the file say its precision."""
    told: dict[str, str] = {f"{PREFIX}precision": target.precision}
    if target.quantized:
        told[f"{PREFIX}int8_profile"] = target.int8_profile
    # what the quantizer notes about itself is no business of who loads the file
    left = [(e.key, e.value) for e in model.metadata_props if e.key not in told and e.key.startswith(PREFIX)]
    del model.metadata_props[:]
    for key, value in sorted([*left, *told.items()]):
        model.metadata_props.add(key=key, value=value)
