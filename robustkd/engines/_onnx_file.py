"""What an ONNX file says about itself: metadata and precision, read off the protobuf without running it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from robustkd.errors import ArtifactError, RequirementError

PREFIX = "robustkd."
"""Our keys in the graph's metadata_props."""

_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}


def read_model(path: Path) -> Any:
    """The ModelProto of a file, without weights that lie in other files.

    Raises:
        ArtifactError: the file is missing, empty, cut short, or no ONNX file.
        RequirementError: the onnx package is missing.
    """
    try:
        import onnx

        decode_error: type[Exception] = import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise RequirementError("reading ONNX files needs the onnx package", where=str(error), fix="pip install onnx") from error
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path.name}: {error.strerror}", where=str(path), fix="give an .onnx file") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except decode_error as error:
        raise damaged(path, "it is cut short, or not ONNX at all") from error
    if not model.graph.node:
        raise damaged(path, "it holds no graph")
    return model


def damaged(path: Path, reason: str) -> ArtifactError:
    """The error for a file that cannot be loaded."""
    return ArtifactError(f"{path.name} is not a usable ONNX file: {reason}", where=str(path), fix="copy or export it again")


def metadata_of(model: Any) -> dict[str, str]:
    """The metadata of the graph; ours begins with `robustkd.`."""
    return {entry.key: entry.value for entry in model.metadata_props}


def precision_of(model: Any) -> str:
    """fp32, fp16, int8 or int8-fp16: as the metadata says, else by quantising nodes and half-precision weights."""
    stated = metadata_of(model).get(f"{PREFIX}precision")
    if stated:
        return stated
    import onnx

    half = any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in model.graph.initializer)
    if any(node.op_type in _QUANTIZED for node in model.graph.node):
        return "int8-fp16" if half else "int8"
    return "fp16" if half else "fp32"


def has_half_scales(model: Any) -> bool:
    """Whether a scale of int8 is held in fp16."""
    import onnx

    half = {weight.name for weight in model.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16}
    return any(node.op_type in _QUANTIZED and any(name in half for name in node.input[1:2]) for node in model.graph.node)


def beyond_onnx(model: Any) -> str:
    """What is wrong with the graph's opset where it is newer than the installed onnx package knows; otherwise nothing."""
    import onnx

    known = onnx.defs.onnx_opset_version()
    stated = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    return f"it uses opset {stated}, and this version of onnx knows up to {known}" if stated > known else ""
