"""The engine for a file, chosen by content first and by suffix second."""

from __future__ import annotations

from pathlib import Path

from robustkd.bundle import MANIFEST, Bundle
from robustkd.engines._base import Engine
from robustkd.engines._plan import SUFFIXES, TAGS, PlanKind
from robustkd.engines._vouched import vouched
from robustkd.engines.ort import OrtEngine
from robustkd.errors import ArtifactError

_ACCEPTED = "give an .onnx or .engine file, or a bundle of kind onnx or engine"


def open_engine(path: Path | str, *, threads: int | None = None, trust: bool = False) -> Engine:
    """Load an exported file, or the one inside an `onnx` or `engine` bundle, whose digests are checked.

    Args:
        path: the file or bundle.
        threads: of ONNX Runtime, inside an operator.
        trust: load a TensorRT engine that no manifest vouches for; engines can hold code that runs on this machine.

    Raises:
        ArtifactError: the file is missing, damaged, not vouched for, or of a kind that is no engine.
        RequirementError: a package, the GPU or the TensorRT version it needs is missing.
    """
    path = Path(path)
    if path.is_dir():
        path = _inside(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise ArtifactError(f"cannot read {path.name}: {error.strerror}", where=str(path), fix=_ACCEPTED) from error
    if head in TAGS or path.suffix in SUFFIXES:
        return _plan(path, TAGS.get(head), trust)
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path.name} is not an engine robustkd knows", where=str(path), fix=_ACCEPTED)
    return OrtEngine(path, threads=threads)


def _plan(path: Path, tagged: PlanKind | None, trust: bool) -> Engine:
    from robustkd.engines.rtx import RtxEngine
    from robustkd.engines.trt import TrtEngine

    kind = tagged or vouched(path).facts.get("kind")
    if kind not in ("trt", "rtx"):
        raise ArtifactError(
            f"{path.name} is no plan of TensorRT or TensorRT-RTX: it begins with neither's tag",
            where=str(path),
            fix="copy it again, or export it again on the device",
        )
    return (RtxEngine if kind == "rtx" else TrtEngine)(path, trust=trust)


def _inside(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise ArtifactError("the folder is not a bundle: it has no manifest.json", where=str(folder), fix=_ACCEPTED)
    bundle = Bundle.open(folder)
    if bundle.manifest.kind not in ("onnx", "engine"):
        raise ArtifactError(f"a bundle of kind {bundle.manifest.kind} is not an engine", where=str(folder), fix=_ACCEPTED)
    return bundle.file(".engine" if bundle.manifest.kind == "engine" else ".onnx")
