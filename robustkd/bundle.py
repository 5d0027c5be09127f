"""Bundles: what one stage hands to the next. A folder of files with a manifest of their digests.

A bundle exists whole or not at all: it is written beside its place and moved there by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from robustkd import __version__
from robustkd.errors import ArtifactError
from robustkd.threat import ThreatModel

Kind = Literal["checkpoint", "onnx", "engine", "audit", "shard"]
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # the manifest's own digest, as `sha256sum -c` reads it
_PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pyautoattack",
    "numpy",
    "tensorrt",
    "tensorrt-rtx-cu12",
)


class ModelInfo(BaseModel, frozen=True, extra="allow"):
    """What a network is and what it takes: images in [0, 1], NCHW."""

    architecture: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    input_range: tuple[float, float] = (0.0, 1.0)


class Manifest(BaseModel, frozen=True, extra="allow"):
    """The content of `manifest.json`; additional keys of a stage are kept."""

    schema_: Literal["robustkd.bundle/1"] = Field("robustkd.bundle/1", alias="schema")
    kind: Kind
    files: dict[str, str] = {}
    parent: str | None = None
    recipe: dict[str, Any] = {}
    model: ModelInfo | None = None
    threat: ThreatModel | None = None
    precision: str = "fp32"
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    created: str = ""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            parts = name.split("/")
            if "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
                raise ValueError(f"{name[:80]!r} is no file inside the folder")
        return files


class Bundle:
    """A folder with a manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path, *, kind: Kind | None = None, check: bool = True) -> Bundle:
        """Read a bundle and compare every file with its digest.

        Raises:
            ArtifactError: the folder is no bundle, of another kind, or a file is missing or changed.
        """
        file = path / MANIFEST
        try:
            manifest = Manifest.model_validate_json(file.read_bytes())
        except OSError as error:
            raise ArtifactError(
                f"not a bundle: manifest.json cannot be read: {error.strerror}",
                where=str(path),
                fix="give the folder of a bundle, such as runs/NAME/checkpoint",
            ) from error
        except ValidationError as error:
            reason = error.errors()[0]
            raise ArtifactError(
                f"manifest.json is damaged: {'.'.join(map(str, reason['loc']))} {reason['msg']}",
                where=str(file),
                fix="make the bundle again",
            ) from error
        if kind is not None and manifest.kind != kind:
            raise ArtifactError(
                f"this bundle is of kind {manifest.kind}, not {kind}", where=str(path), fix=f"name a bundle of kind {kind}"
            )
        bundle = cls(path, manifest)
        if check:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare every file with its digest.

        Raises:
            ArtifactError: one is missing or has changed.
        """
        for name, digest in {MANIFEST: self._sealed(), **self.manifest.files}.items():
            file = self.path / name
            try:
                found = sha256(file)
            except OSError as error:
                raise ArtifactError(
                    f"{name[:80]} is missing from the bundle, or cannot be read: {error.strerror}",
                    where=str(self.path),
                    fix="make the bundle again",
                ) from error
            if found != digest:
                raise ArtifactError(
                    f"{name} is not the file the manifest describes: its digest differs",
                    where=str(file),
                    fix="copy or make the bundle again",
                )

    def _sealed(self) -> str:
        """The digest that the manifest had when the bundle was made."""
        file = self.path / SEAL
        try:
            line = file.read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{SEAL} is missing from the bundle, or cannot be read: {error.strerror}",
                where=str(self.path),
                fix="make the bundle again",
            ) from error
        digest = line[:64].decode("ascii", "replace")
        if line != _seal(f"sha256:{digest}"):
            raise ArtifactError(f"{SEAL} is damaged", where=str(file), fix="copy or make the bundle again")
        return f"sha256:{digest}"

    @property
    def digest(self) -> str:
        """The digest of the manifest, which children name as their parent."""
        return sha256(self.path / MANIFEST)

    def file(self, suffix: str) -> Path:
        """The one file of the bundle that ends with `suffix`.

        Raises:
            ArtifactError: there is none.
        """
        for name in self.manifest.files:
            if name.endswith(suffix):
                return self.path / name
        raise ArtifactError(f"the bundle holds no {suffix} file", where=str(self.path), fix="make the bundle again")


def newest_checkpoint(runs: Path) -> Path:
    """The checkpoint bundle made last among the runs of a folder; unfinished and foreign folders are passed over.

    Raises:
        ArtifactError: there is none.
    """
    found: list[tuple[str, float, Path]] = []
    for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}"):
        for file in (f for f in runs.glob(pattern) if not f.parent.name.startswith(".")):
            try:
                manifest = Bundle.open(file.parent, kind="checkpoint", check=False).manifest
            except ArtifactError:
                continue
            found.append((manifest.created, file.stat().st_mtime, file.parent))
    if not found:
        raise ArtifactError(
            "there is no checkpoint here", where=str(runs.absolute()), fix="run `robustkd distill` first, or name a checkpoint"
        )
    return max(found)[2]


@contextmanager
def create(path: Path, kind: Kind, *, parent: Bundle | None = None, **fields: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Make a bundle: fill the folder yielded (and add to the manifest fields), then it is moved into place.

    Fields that are left out are inherited from the parent's manifest (recipe, model, threat, precision).

    Raises:
        ArtifactError: a bundle is at `path` already, or the place cannot be written.
    """
    try:
        if (path.exists() or path.is_symlink()) and not (path.is_dir() and not any(path.iterdir())):
            raise ArtifactError("there is something here already", where=str(path), fix="choose another --output, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write here: {error.strerror}", where=str(path.parent), fix="choose another --output"
        ) from error
    inherited = {} if parent is None else parent.manifest.model_dump(include={"recipe", "model", "threat", "precision"})
    values: dict[str, Any] = inherited | fields
    try:
        yield work, values
        names = sorted(f.relative_to(work).as_posix() for f in work.rglob("*") if f.is_file())
        manifest = Manifest.model_validate(
            {
                **values,
                "kind": kind,
                "files": {name: sha256(work / name) for name in names},
                "parent": parent.digest if parent else None,
                "versions": versions(),
                "hardware": hardware() | values.get("hardware", {}),
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )
        write_atomic(work / MANIFEST, manifest.model_dump_json(by_alias=True, indent=1).encode())
        write_atomic(work / SEAL, _seal(sha256(work / MANIFEST)))
        _move(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _seal(digest: str) -> bytes:
    return f"{digest.removeprefix('sha256:')}  {MANIFEST}\n".encode()


def _move(work: Path, path: Path) -> None:
    try:
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # some writers keep their files to themselves
        work.chmod(0o755)
        work.replace(path)  # takes the place of an empty folder, and of nothing else
    except OSError as error:
        raise ArtifactError(
            f"cannot move the finished bundle here: {error.strerror}", where=str(path), fix="choose another --output"
        ) from error


def sha256(file: Path) -> str:
    """`sha256:` and the hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def write_atomic(file: Path, data: bytes) -> None:
    """Write a file so that it holds either its old or its new content, whatever happens, also when several write it at once.

    Raises:
        ArtifactError: the disk is full, or the place cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {file.name}: {error.strerror}",
            where=str(file.parent),
            fix="free space, or choose another --output",
        ) from error


def write_json(file: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(file, (json.dumps(value, indent=1) + "\n").encode())


def versions() -> dict[str, str]:
    """The versions of robustkd, Python and the packages that matter, as installed; nothing is imported."""
    found = {"robustkd": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine in words, without importing torch."""
    return {"machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(), "system": sys.platform}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
