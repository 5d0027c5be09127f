"""What a report is made from: results, the images beside them, and the bundles above them.

An audit bundle is `runs/<name>/<target>/audit`; its ancestors are `runs/<name>/<target>` and
`runs/<name>/checkpoint`. Whatever is found there is compared with the digests that the children name.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from robustkd.bundle import MANIFEST, Bundle, Manifest, sha256
from robustkd.errors import ArtifactError
from robustkd.reporting.records import Predictions, read_predictions
from robustkd.result import AuditResult

RESULT = "result.json"


@dataclass(frozen=True)
class Adversarial:
    """The images an audit kept: `x` and `x_adv` (N, C, H, W) float32 in [0, 1], `y` and `index` (N,) integers."""

    x: NDArray[np.float32]
    x_adv: NDArray[np.float32]
    y: NDArray[np.int64]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Link:
    """One bundle in the chain of custody; `digest` is that of its manifest, `found` says whether it is here."""

    kind: str
    digest: str
    place: str = ""
    found: bool = False
    created: str = ""


@dataclass(frozen=True)
class ReportInput:
    """One result and what is known around it; everything but the result may be missing."""

    result: AuditResult
    place: str = ""
    manifest: Manifest | None = None
    adversarial: Adversarial | None = None
    predictions: Predictions | None = None
    chain: tuple[Link, ...] = ()
    metrics: tuple[dict[str, Any], ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, or nothing where no manifest tells them."""
        model = self.manifest.model if self.manifest else None
        return model.classes if model else ()


def find(paths: Iterable[Path]) -> list[Path]:
    """The audits that the paths mean: an audit bundle or a result.json itself, every audit below a run folder.

    Raises:
        ArtifactError: a path does not exist, or there is no audit in it.
    """
    found: list[Path] = []
    for path in paths:
        shards = path.with_name(f"{path.name}.shards")
        place = shards if not path.exists() and shards.is_dir() else path
        found += _below(place) if place.is_dir() else [place]
    return list({path.resolve(): path for path in found}.values())


def _below(folder: Path) -> list[Path]:
    if _kind(folder) == "audit":
        return [folder]
    if (folder / RESULT).is_file():
        return [folder / RESULT]
    # a folder whose name begins with a dot is an audit at work, not yet a result
    seen = sorted(f for f in folder.rglob(RESULT) if not any(p.startswith(".") for p in f.relative_to(folder).parts))
    results = [f.parent if (f.parent / MANIFEST).is_file() else f for f in seen]
    if not results:
        _name_shards(folder)
        raise ArtifactError("there is no audit in this folder", where=str(folder), fix="make one with robustkd audit")
    return results


def _name_shards(folder: Path) -> None:
    """Say which shards are here and which are missing, where this is an audit that is not merged yet.

    Raises:
        ArtifactError: it is.
    """
    manifests = [folder / MANIFEST, *sorted(folder.glob(f"[0-9]*-of-*/{MANIFEST}"))]
    shards = [str(getattr(Bundle.open(f.parent, check=False).manifest, "shard", "")) for f in manifests if f.is_file()]
    held = [tuple(map(int, shard.split("/"))) for shard in shards if shard.replace("/", "").isdecimal()]
    if held:
        total = max(n for _, n in held)
        absent = [f"{i}/{total}" for i in range(1, total + 1) if (i, total) not in held]
        state = f"{', '.join(absent)} missing" if absent else "all are here"
        raise ArtifactError(
            f"shards of an audit, not merged yet: {', '.join(shards)} finished, {state}",
            where=str(folder),
            fix="run robustkd audit with --shard for the missing ones, or with --merge and this folder",
        )


def _kind(folder: Path) -> str:
    return Bundle.open(folder, check=False).manifest.kind if (folder / MANIFEST).is_file() else ""


def read(path: Path) -> ReportInput:
    """Read an audit bundle with every digest checked, or a result.json that stands alone.

    Raises:
        ArtifactError: it is missing, damaged or of the wrong kind.
    """
    folder = path.parent if path.name == RESULT and (path.parent / MANIFEST).is_file() else path
    if not folder.is_dir():
        return ReportInput(read_result(path), place=str(path))
    bundle = Bundle.open(folder, kind="audit")
    above = _ancestors(bundle)
    return ReportInput(
        read_result(bundle.file(RESULT)),
        place=str(folder),
        manifest=bundle.manifest,
        adversarial=_adversarial(folder),
        predictions=read_predictions(folder / "records.parquet"),
        chain=_chain(bundle, above),
        metrics=_metrics(above),
    )


def read_result(file: Path) -> AuditResult:
    """The content of one result.json.

    Raises:
        ArtifactError: it cannot be read, or is no result of an audit.
    """
    try:
        return AuditResult.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError("this result cannot be read", where=str(file), fix=str(error.strerror)) from error
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(map(str, reason["loc"]))
        raise ArtifactError(
            f"this is not the result of an audit, or it is damaged: {where} {reason['msg']}".replace("  ", " "),
            where=str(file),
            fix="make the audit again",
        ) from error


def _ancestors(bundle: Bundle) -> list[Bundle]:
    """The bundles above an audit that are where a run puts them and whose digests their children name."""
    chain: list[Bundle] = []
    child = bundle
    for place in (bundle.path.resolve().parent, bundle.path.resolve().parent.parent / "checkpoint"):
        if child.manifest.parent is None or not (place / MANIFEST).is_file():
            continue
        above = Bundle.open(place, check=False)
        if above.digest == child.manifest.parent:
            chain.append(above)
            child = above
    return chain


def _chain(bundle: Bundle, above: list[Bundle]) -> tuple[Link, ...]:
    known = [bundle, *above]
    links = [Link(b.manifest.kind, b.digest, _name(b.path), True, b.manifest.created) for b in known]
    if (parent := known[-1].manifest.parent) is not None:
        links.append(Link("parent", parent))
    return tuple(links)


def _name(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])


def _metrics(above: list[Bundle]) -> tuple[dict[str, Any], ...]:
    """The training curve of the checkpoint in the chain; nothing where there is none."""
    for bundle in above:
        if bundle.manifest.kind == "checkpoint" and "metrics.jsonl" in bundle.manifest.files:
            return _lines(bundle.path / "metrics.jsonl", bundle.manifest.files["metrics.jsonl"])
    return ()


def _lines(file: Path, digest: str) -> tuple[dict[str, Any], ...]:
    try:
        if sha256(file) != digest:
            raise ArtifactError(
                "metrics.jsonl is not the file the manifest describes: its digest differs",
                where=str(file),
                fix="copy the run again",
            )
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ArtifactError("metrics.jsonl cannot be read", where=str(file), fix=str(error)) from error
    return tuple(line for line in lines if isinstance(line, dict))


def _adversarial(folder: Path) -> Adversarial | None:
    file = folder / "adversarial.npz"
    if not file.is_file():
        return None
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            images = Adversarial(
                x=np.asarray(data["x"], np.float32),
                x_adv=np.asarray(data["x_adv"], np.float32),
                y=np.asarray(data["y"], np.int64),
                index=np.asarray(data["index"], np.int64),
            )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError("adversarial.npz cannot be read", where=str(file), fix=str(error)) from error
    sizes = {len(images.x), len(images.x_adv), len(images.y), len(images.index)}
    if images.x.ndim != 4 or images.x.shape != images.x_adv.shape or len(sizes) != 1:
        raise ArtifactError("adversarial.npz does not hold images in pairs", where=str(file), fix="make the audit again")
    return images
