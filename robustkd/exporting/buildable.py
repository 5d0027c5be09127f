"""Whether a target can be built on this machine, asked before any work."""

from __future__ import annotations

from robustkd.recipe.target import Kind, Target


def check_buildable(target: Target, place: str = "BUNDLE") -> Kind:
    """What a target is built with here: `onnx`, or the TensorRT that this machine has.

    Args:
        target: the profile.
        place: what the command to run elsewhere calls the bundle.

    Raises:
        RequirementError: it cannot be built here.
        ConfigError: an option that its TensorRT does not have.
    """
    if target.kind == "onnx":
        return "onnx"
    from robustkd.engines._tensorrt import library
    from robustkd.exporting.trt.builder import check_capabilities, check_options
    from robustkd.exporting.trt.machine import choose, this_machine

    kind = choose(target.kind, this_machine(), precision=target.precision, place=place, gpus=target.gpus)
    check_options(kind, target.engine)
    if kind == "rtx":
        check_capabilities(library("rtx"), target.engine.capabilities, f"target {target.name}")
    return kind
