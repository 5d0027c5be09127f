"""The engine for a file, chosen by content first and by suffix second."""

from __future__ import annotations

from pathlib import Path

from robustkd.bundle import MANIFEST, Bundle
from robustkd.engines._base import Engine
from robustkd.engines.ort import OrtEngine
from robustkd.errors import ArtifactError, RequirementError

#: first bytes of serialised engines, classic TensorRT and TensorRT-RTX
_PLAN_TAGS = (b"ftrt", b"vtrt")
_PLAN_SUFFIXES = (".engine", ".plan", ".trt")
_ACCEPTED = "give an .onnx file, or a bundle of kind onnx"


def open_engine(path: Path, *, threads: int | None = None) -> Engine:
    """Load an exported file, or the one inside an `onnx` bundle, whose digests are checked.

    Raises:
        ArtifactError: the file is missing, damaged, or of a kind that is no engine.
        RequirementError: it is a TensorRT engine, which this version cannot run, or a package is missing.
    """
    if path.is_dir():
        return OrtEngine(_inside(path), threads=threads)
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise ArtifactError(f"cannot read {path.name}: {error.strerror}", where=str(path), fix=_ACCEPTED) from error
    if head in _PLAN_TAGS or path.suffix in _PLAN_SUFFIXES:
        raise RequirementError(
            "TensorRT engines cannot be run by this version of robustkd",
            where=str(path),
            fix="use the .onnx file the engine was built from",
        )
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path.name} is not an engine robustkd knows", where=str(path), fix=_ACCEPTED)
    return OrtEngine(path, threads=threads)


def _inside(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise ArtifactError("the folder is not a bundle: it has no manifest.json", where=str(folder), fix=_ACCEPTED)
    bundle = Bundle.open(folder)
    if bundle.manifest.kind == "engine":
        raise RequirementError(
            "TensorRT engines cannot be run by this version of robustkd", where=str(folder), fix="export --onnx instead"
        )
    if bundle.manifest.kind != "onnx":
        raise ArtifactError(f"a bundle of kind {bundle.manifest.kind} is not an engine", where=str(folder), fix=_ACCEPTED)
    return bundle.file(".onnx")
