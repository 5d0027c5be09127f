"""What is under audit: a bundle or a bare file becomes an engine, and its source is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from robustkd.auditing.facts import ArtifactFacts, SourceModel
from robustkd.auditing.fresh import Reopen
from robustkd.bundle import MANIFEST, Bundle, sha256
from robustkd.engines._base import Engine
from robustkd.errors import ArtifactError, ConfigError
from robustkd.threat import ThreatModel

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, int, int]
Runtime = Literal["onnxruntime", "onnx-torch"]
"""What runs an .onnx file: ONNX Runtime, as it is used, or the same graph in torch, which knows GPUs."""

#: what is done without a source
_ALONE = ": it is attacked through its own graph and held against no source; give --source"
#: given in place of a source: none, though there is one
NO_SOURCE = Path("none")


@dataclass(frozen=True)
class Subject:
    """The artifact under audit.

    Attributes:
        facts: its file.
        engine: from the shape (C, H, W) of the data's images to what runs it; an engine that knows its own keeps to it.
        home: the folder of its audit, where none is asked for.
        bundle: the bundle around it.
        net: its network, where it is one.
        recipe: at least `dataset`, and perhaps `audit`; empty for a bare file.
        threat: what it should withstand, where that is known.
        reopen: how a fresh process opens the engine.
    """

    facts: ArtifactFacts
    engine: Callable[[Shape], Engine]
    home: Path
    bundle: Bundle | None = None
    net: nn.Module | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    threat: ThreatModel | None = None
    reopen: Reopen | None = None


def reopen_trusted(path: str, shape: Shape) -> Engine:
    """The engine of a file that the user trusts, in a fresh process."""
    from robustkd.engines._open import open_engine

    return open_engine(Path(path), trust=True)


def reopen_placed(told: str, shape: Shape) -> Engine:
    """The engine of a network or graph that runs in torch on some device, in a fresh process."""
    from robustkd.engines.pytorch import without_tf32

    path, device, runtime = json.loads(told)
    without_tf32()
    return open_subject(Path(path), device=device, runtime=runtime).engine(shape)


def open_subject(path: Path, *, trust: bool = False, device: str = "cpu", runtime: Runtime | None = None) -> Subject:
    """Open a bundle folder (checkpoint, onnx or engine) or a bare file; a bundle around the file is taken into account.

    Args:
        path: the folder or file.
        trust: load a TensorRT engine that no manifest vouches for.
        device: where a checkpoint runs, or an .onnx file in torch.
        runtime: of an .onnx file; left out, ONNX Runtime, which runs it on the CPU.

    Raises:
        ArtifactError: it is missing, damaged, not vouched for, or nothing that can be audited.
        RequirementError: a package, a GPU or a version is missing.
    """
    if not path.exists():
        raise ArtifactError("there is no such file or folder", where=str(path), fix="name a bundle or an .onnx file")
    bundle = _bundle_of(path)
    if bundle is not None and bundle.manifest.kind == "checkpoint":
        if runtime is not None:
            raise ConfigError("a checkpoint runs in torch as it is", where=f"--runtime {runtime}", fix="leave it out")
        return _checkpoint(bundle, device)
    if bundle is not None and bundle.manifest.kind not in ("onnx", "engine"):
        raise ArtifactError(
            f"a bundle of kind {bundle.manifest.kind} cannot be audited",
            where=str(bundle.path),
            fix="name a bundle of kind checkpoint, onnx or engine",
        )
    if bundle is None and path.suffix == ".safetensors":
        raise ArtifactError(
            "bare weights do not say which network they belong to",
            where=str(path),
            fix="name the checkpoint bundle they lie in",
        )
    from robustkd.engines._open import open_engine

    file = path if bundle is None else bundle.file(".engine" if bundle.manifest.kind == "engine" else ".onnx")
    if path.suffix == ".onnx" and path.is_file():
        file = path  # the graph inside an engine bundle can be audited too
    if runtime == "onnx-torch":
        engine, again = _in_torch(file, device), _placed(file, device, runtime)
    else:
        engine, again = _genuine(open_engine(file, trust=trust), file), _again(file, trust=trust)
    if bundle is None:
        return Subject(_facts(path), lambda shape: engine, path.parent / f"{path.stem}-audit", reopen=again)
    return _of_bundle(bundle, file, engine, again)


def _in_torch(file: Path, device: str) -> Engine:
    if file.suffix != ".onnx":
        raise ConfigError(
            f"{file.name} is no graph that torch can run",
            where="--runtime onnx-torch",
            fix="name an .onnx file, or leave it out",
        )
    from robustkd.engines.onnx_torch import OnnxTorchEngine
    from robustkd.engines.pytorch import chosen

    return OnnxTorchEngine(file, device=chosen(device))


def _placed(path: Path, device: str, runtime: Runtime | None = None) -> Reopen:
    return Reopen("robustkd.auditing.artifact:reopen_placed", json.dumps([str(path.resolve()), device, runtime]))


def _genuine(engine: Engine, file: Path) -> Engine:
    """The engine, unless it runs on the stand-in that tests use for TensorRT.

    Raises:
        ArtifactError: it does.
    """
    if engine.info.runtime.startswith("fake"):
        raise ArtifactError(
            f"{engine.info.runtime} is a stand-in for tests: no audit of it means anything",
            where=str(file),
            fix="audit the engine on a machine with its GPU",
        )
    return engine


def _facts(file: Path) -> ArtifactFacts:
    return ArtifactFacts(str(file), sha256(file))


def _of_bundle(bundle: Bundle, file: Path, engine: Engine, again: Reopen, net: nn.Module | None = None) -> Subject:
    told = bundle.manifest
    twin = told.kind == "engine" and file.suffix == ".onnx"
    home = bundle.path / ("audit-onnx" if twin else "audit")
    return Subject(_facts(file), lambda shape: engine, home, bundle, net, told.recipe, told.threat, again)


def _again(file: Path, *, trust: bool = False) -> Reopen:
    entry = "robustkd.auditing.artifact:reopen_trusted" if trust else "robustkd.auditing.fresh:open_file"
    return Reopen(entry, str(file.resolve()))


def _bundle_of(path: Path) -> Bundle | None:
    if path.is_dir():
        return Bundle.open(path)
    if (path.parent / MANIFEST).is_file():
        bundle = Bundle.open(path.parent)
        return bundle if path.name in bundle.manifest.files else None
    return None


def _checkpoint(bundle: Bundle, device: str = "cpu") -> Subject:
    from robustkd.engines.pytorch import PytorchEngine, chosen
    from robustkd.models._files import load_net

    net, info, file = load_net(bundle).to(chosen(device)), bundle.manifest.model, bundle.file("model.safetensors")
    if info is None:
        raise ArtifactError(
            "the manifest does not say what the model is", where=str(bundle.path), fix="distill it again with this version"
        )
    engine = PytorchEngine(net, input_shape=info.input_shape, classes=len(info.classes))
    return _of_bundle(bundle, file, engine, _placed(bundle.path, device), net)


def find_source(subject: Subject, given: Path | None, say: Callable[[str], None], device: str = "cpu") -> SourceModel | None:
    """The checkpoint given, or the one a bundle comes from where it lies beside it with the right digest; `none` is none.

    Raises:
        ArtifactError: the checkpoint given is none.
    """
    from robustkd.engines.pytorch import chosen
    from robustkd.models._files import load_net

    if given == NO_SOURCE and not given.exists():
        say(f"as asked{_ALONE.partition(';')[0]}")
        return None
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
    return SourceModel(load_net(bundle).to(chosen(device)), str(file), sha256(file))


def _parent(subject: Subject, say: Callable[[str], None]) -> Bundle | None:
    if subject.bundle is None or subject.bundle.manifest.kind not in ("onnx", "engine"):
        return None
    place = subject.bundle.path.resolve().parent / "checkpoint"
    if not (place / MANIFEST).is_file():
        say(f"the checkpoint this was exported from is not at {place}{_ALONE}")
        return None
    bundle = Bundle.open(place, kind="checkpoint")
    if bundle.digest not in _ancestors(subject.bundle):
        say(f"{place} is not the checkpoint this was exported from{_ALONE}")
        return None
    return bundle


def _ancestors(bundle: Bundle) -> set[str | None]:
    """The parent's digest, and the parent's own: an engine may be built from an onnx bundle that lies beside it."""
    found = {bundle.manifest.parent}
    for file in bundle.path.resolve().parent.glob(f"*/{MANIFEST}"):
        if sha256(file) == bundle.manifest.parent:
            found.add(Bundle.open(file.parent, check=False).manifest.parent)
    return found
