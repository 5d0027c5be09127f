"""What is under audit: a bundle or a bare file becomes an engine, and its source is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from robustkd.auditing.run import ArtifactFacts, SourceModel
from robustkd.bundle import MANIFEST, Bundle, sha256
from robustkd.engines._base import Engine
from robustkd.errors import ArtifactError


@dataclass(frozen=True)
class Subject:
    """The artifact: its engine, its file, the bundle around it, and its network if it is one."""

    engine: Engine
    facts: ArtifactFacts
    bundle: Bundle | None
    net: nn.Module | None
    home: Path

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of the bundle; empty for a bare file."""
        return self.bundle.manifest.recipe if self.bundle else {}


def open_subject(path: Path) -> Subject:
    """Open a bundle folder (checkpoint or onnx) or a bare file; a bundle around the file is taken into account.

    Raises:
        ArtifactError: it is missing, damaged, or nothing that can be audited.
        RequirementError: a package is missing.
    """
    if not path.exists():
        raise ArtifactError("there is no such file or folder", where=str(path), fix="name a bundle or an .onnx file")
    bundle = _bundle_of(path)
    if bundle is not None and bundle.manifest.kind == "checkpoint":
        return _checkpoint(bundle)
    if bundle is not None and bundle.manifest.kind != "onnx":
        raise ArtifactError(
            f"a bundle of kind {bundle.manifest.kind} cannot be audited",
            where=str(bundle.path),
            fix="name a checkpoint or an onnx bundle",
        )
    if bundle is None and path.suffix == ".safetensors":
        raise ArtifactError(
            "bare weights do not say which network they belong to",
            where=str(path),
            fix="name the checkpoint bundle they lie in",
        )
    from robustkd.engines._open import open_engine

    file = bundle.file(".onnx") if bundle is not None else path
    home = bundle.path / "audit" if bundle is not None else path.parent / f"{path.stem}-audit"
    return Subject(open_engine(file), ArtifactFacts(str(file), sha256(file)), bundle, None, home)


def _bundle_of(path: Path) -> Bundle | None:
    if path.is_dir():
        return Bundle.open(path)
    if (path.parent / MANIFEST).is_file():
        bundle = Bundle.open(path.parent)
        return bundle if path.name in bundle.manifest.files else None
    return None


def _checkpoint(bundle: Bundle) -> Subject:
    from robustkd.engines.pytorch import PytorchEngine
    from robustkd.models._files import load_net

    net, info, file = load_net(bundle), bundle.manifest.model, bundle.file("model.safetensors")
    if info is None:
        raise ArtifactError(
            "the manifest does not say what the model is", where=str(bundle.path), fix="distill it again with this version"
        )
    engine = PytorchEngine(net, input_shape=info.input_shape, classes=len(info.classes))
    return Subject(engine, ArtifactFacts(str(file), sha256(file)), bundle, net, bundle.path / "audit")


def find_source(subject: Subject, given: Path | None, say: Callable[[str], None]) -> SourceModel | None:
    """The checkpoint given, or the parent of an onnx bundle where it lies beside it with the right digest.

    Raises:
        ArtifactError: the checkpoint given is none.
    """
    from robustkd.models._files import load_net

    if given is not None:
        inside = given / "checkpoint"
        folder = inside if (inside / MANIFEST).is_file() and not (given / MANIFEST).is_file() else given
        bundle = Bundle.open(folder.parent if folder.is_file() else folder, kind="checkpoint")
    else:
        found = _parent(subject, say)
        if found is None:
            return None
        bundle = found
    file = bundle.file("model.safetensors")
    return SourceModel(load_net(bundle), str(file), sha256(file))


def _parent(subject: Subject, say: Callable[[str], None]) -> Bundle | None:
    if subject.bundle is None or subject.bundle.manifest.kind != "onnx":
        return None
    place = subject.bundle.path.resolve().parent / "checkpoint"
    if not (place / MANIFEST).is_file():
        say(f"the checkpoint this was exported from is not at {place}: no white-box attack can run; give --source")
        return None
    bundle = Bundle.open(place, kind="checkpoint")
    if bundle.digest != subject.bundle.manifest.parent:
        say(f"{place} is not the checkpoint this was exported from: no white-box attack can run; give --source")
        return None
    return bundle
