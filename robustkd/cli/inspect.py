"""`robustkd inspect`: what a file or bundle is, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustkd.cli._print import Json, columns, emit
from robustkd.errors import ArtifactError

if TYPE_CHECKING:
    from robustkd.bundle import Manifest


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .onnx, .engine or .safetensors file, or a bundle folder.")],
    json: Json = False,
) -> None:
    """Say what a file or bundle is: kind, digest, inputs and outputs, parameters, metadata."""
    facts = examine(file)
    if json:
        emit(facts)
    else:
        columns(_rows(facts))


def examine(path: Path) -> dict[str, Any]:
    """The facts about a file or bundle; always `path`, `kind` and `sha256` (of a bundle: of its manifest).

    Raises:
        ArtifactError: it is missing, damaged, or of no kind robustkd knows.
    """
    from robustkd.bundle import sha256

    if path.is_dir():
        return _bundle(path)
    if not path.is_file():
        raise ArtifactError("there is no such file", where=str(path), fix="check the path")
    from robustkd.engines._plan import SUFFIXES, read_header

    if read_header(path) is not None or path.suffix.lower() in SUFFIXES:
        return {"path": str(path), "kind": "engine", "sha256": sha256(path), "bytes": path.stat().st_size} | _plan(path)
    readers = {".onnx": _onnx, ".safetensors": _safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ArtifactError(
            f"{path.suffix or 'a file without suffix'} is no kind of file that inspect knows",
            where=str(path),
            fix="name a bundle folder, or a file that ends with " + " or ".join((*readers, ".engine")),
        )
    common = {"path": str(path), "kind": path.suffix.lower()[1:], "sha256": sha256(path), "bytes": path.stat().st_size}
    return common | reader(path)


def _bundle(path: Path) -> dict[str, Any]:
    from robustkd.bundle import Bundle

    bundle = Bundle.open(path)
    manifest = bundle.manifest.model_dump(mode="json", by_alias=True)
    return {"path": str(path), "sha256": bundle.digest} | manifest


def _plan(path: Path) -> dict[str, Any]:
    """What is known of a TensorRT plan, by who says it; nothing is loaded, so it can be done on any machine."""
    from robustkd.engines._plan import read_header
    from robustkd.engines._tensorrt import FAMILIES
    from robustkd.engines._vouched import vouched

    header, known = read_header(path), vouched(path)
    if header is None and known.bundle is None:
        raise ArtifactError(
            "not a plan of TensorRT or TensorRT-RTX: it begins with neither's tag",
            where=str(path),
            fix="copy it again, or export it again on the device",
        )
    told: dict[str, Any] = {"vouched_for": known.bundle is not None}
    if header is not None:
        hints = {"runtime": FAMILIES[header.kind].title, "version": header.version, "gpus": ", ".join(header.targets)}
        told["from header"] = {key: value for key, value in hints.items() if value}
    if known.bundle is not None:
        told["from manifest"] = {"precision": known.precision, **_provenance(known.bundle.manifest), **known.facts}
    return told


def _provenance(manifest: Manifest) -> dict[str, Any]:
    model, threat = manifest.model, manifest.threat
    return {
        "inputs": f"float [N, {', '.join(map(str, model.input_shape))}] in {list(model.input_range)}" if model else "unknown",
        "architecture": model.architecture if model else "unknown",
        "classes": len(model.classes) if model else "unknown",
        "threat": threat.model_dump(mode="json") if threat else "unknown",
        "parent": manifest.parent,
        "created": manifest.created,
    }


def _onnx(path: Path) -> dict[str, Any]:
    import numpy as np
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ArtifactError(
            f"not a valid ONNX file: {_sentence(error)}", where=str(path), fix="export or copy it again"
        ) from error
    graph = model.graph
    operators = sorted({node.op_type for node in graph.node})
    return {
        "opset": {item.domain or "ai.onnx": item.version for item in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": {value.name: _type(value) for value in graph.input},
        "outputs": {value.name: _type(value) for value in graph.output},
        "parameters": sum(int(np.prod(tensor.dims)) for tensor in graph.initializer),
        "weight_types": sorted({onnx.TensorProto.DataType.Name(t.data_type).lower() for t in graph.initializer}),
        "quantized": "QuantizeLinear" in operators,
        "nodes": len(graph.node),
        "operators": operators,
        "metadata": {item.key: item.value for item in model.metadata_props},
    }


def _type(value: Any) -> str:
    """An ONNX value's type and shape: `float [N, 3, 32, 32]`."""
    import onnx

    tensor = value.type.tensor_type
    shape = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(shape)}]"


def _safetensors(path: Path) -> dict[str, Any]:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118 - it is no mapping
            shapes = {name: list(piece.get_shape()) for name, piece in slices.items()}
            types = sorted({str(piece.get_dtype()) for piece in slices.values()})
            metadata = stream.metadata() or {}
    except SafetensorError as error:
        raise ArtifactError(
            f"not a valid safetensors file: {_sentence(error)}", where=str(path), fix="copy or make it again"
        ) from error
    return {
        "numbers": sum(int(np.prod(shape)) for shape in shapes.values()),
        "types": types,
        "metadata": metadata,
        "tensors": shapes,
    }


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts as lines: mappings one indented line per key, lists on one line, empty ones left out."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            rows.append((key, ""))
            rows.extend((f"  {name}", str(inner)) for name, inner in value.items())
        elif value not in ({}, [], None, ""):
            rows.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
