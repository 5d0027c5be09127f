"""A kit: one file with everything an audit needs on a device that has an engine and no torch.

Images, every adversarial image that an audit made, labels, and what the source answered, with a digest over all of it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from robustkd.auditing.facts import AuditArrays
from robustkd.auditing.sides import Judged
from robustkd.auditing.store import UNREADABLE, Arrays, piece_name, read_npz
from robustkd.bundle import ModelInfo, write_atomic
from robustkd.engines._base import Images
from robustkd.errors import ArtifactError
from robustkd.result import AuditResult, Dataset, Level, Source
from robustkd.threat import ThreatModel


class Made(BaseModel, frozen=True, extra="forbid"):
    """One attack whose images are in the kit."""

    name: str
    level: Level


class Told(BaseModel, frozen=True, extra="forbid"):
    """What a kit says about itself."""

    schema_: Literal["robustkd.kit/1"] = Field("robustkd.kit/1", alias="schema")
    artifact: str = Field(description="sha256 of the file that the audit attacked")
    source: Source | None
    threat: ThreatModel
    dataset: Dataset
    policy: dict[str, Any]
    seed: int
    attacks: tuple[Made, ...]
    model: ModelInfo | None = None


@dataclass(frozen=True)
class Pool:
    """The images of one attack, the positions of their originals, and what the source answered."""

    made: Made
    index: NDArray[np.int64]
    x_adv: Images
    source: Judged | None


@dataclass(frozen=True)
class Kit:
    """A kit as it is read; `source` holds the source's clean answers, `digest` is over all content."""

    told: Told
    x: Images
    y: NDArray[np.int64]
    index: NDArray[np.int64]
    source: Judged | None
    pools: tuple[Pool, ...]
    digest: str


def check_place(file: Path) -> None:
    """Refuse a kit that could not be written, before hours of attack.

    Raises:
        ArtifactError: there is something already, the folder is missing, or the name does not end with .npz.
    """
    if file.suffix != ".npz":
        raise ArtifactError(f"{file.name} is no name for a kit", where=str(file), fix="end it with .npz")
    if file.exists():
        raise ArtifactError("there is a file here already", where=str(file), fix="choose another --save-kit")
    if not file.parent.is_dir():
        raise ArtifactError("the folder does not exist", where=str(file.parent), fix=f"mkdir -p {file.parent}")


def save_kit(file: Path, result: AuditResult, arrays: AuditArrays, model: ModelInfo | None = None) -> str:
    """Write the kit of an audit that has just ended; returns its digest.

    Raises:
        ArtifactError: it cannot be written.
    """
    attacks = tuple(Made(name=name, level=attack.level) for name, attack in result.engine.attacks.items())
    told = Told(
        artifact=result.artifact.sha256,
        source=result.source,
        threat=result.threat,
        dataset=result.dataset,
        policy=result.policy,
        seed=result.seed,
        attacks=attacks,
        model=model,
    )
    content: Arrays = {"x": _small(arrays.x), "y": arrays.y, "index": arrays.index}
    if arrays.ledger.source is not None:
        clean = arrays.ledger.source.clean
        content |= {"source.prediction": clean.prediction, "source.margin": clean.margin}
    for number, made in enumerate(attacks):
        content |= {f"{number:03d}.{key}": values for key, values in _pool(arrays, made.name).items()}
    text = told.model_dump_json(by_alias=True)
    digest = _digest(text, content)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content, told=np.asarray(text), digest=np.asarray(digest))  # type: ignore[arg-type]
    write_atomic(file, buffer.getvalue())
    return digest


def _small(x: Images) -> NDArray[Any]:
    """8-bit images as such: an eighth of the room, and the same floats again."""
    levels = np.rint(x * 255).astype(np.uint8)
    return levels if np.array_equal(_floats(levels), x) else x


def _floats(x: NDArray[Any]) -> Images:
    floats: Images = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x
    return floats


def _pool(arrays: AuditArrays, name: str) -> Arrays:
    """All chunks of one attack, one after another."""
    chunks = list(_chunks(arrays, name))
    if not chunks:
        return {"index": np.zeros(0, np.int64), "x_adv": arrays.x[:0]}
    keys = {"index": "index", "x_adv": "x_adv", "prediction": "source_prediction", "margin": "source_margin"}
    return {to: np.concatenate([chunk[key] for chunk in chunks]) for to, key in keys.items() if key in chunks[0]}


def _chunks(arrays: AuditArrays, name: str) -> Iterator[Arrays]:
    for number in range(len(arrays.x)):
        piece = arrays.store.get(piece_name(name, number))
        if piece is not None:
            yield piece


def read_kit(file: Path) -> Kit:
    """Read a kit and compare its content with its digest; nothing in it can run code.

    Raises:
        ArtifactError: it is missing, damaged, or no kit.
    """
    try:
        content = read_npz(file)
    except FileNotFoundError as error:
        raise ArtifactError("there is no such kit", where=str(file), fix="name the file that --save-kit wrote") from error
    except UNREADABLE as error:
        raise _damaged(file, "it cannot be read") from error
    try:
        text, digest = str(content.pop("told")), str(content.pop("digest"))
        told = Told.model_validate_json(text)
    except (KeyError, ValidationError) as error:
        raise ArtifactError("this is no kit of an audit", where=str(file), fix="name what --save-kit wrote") from error
    if digest != _digest(text, content):
        raise _damaged(file, "its digest differs")
    try:
        return _kit(told, content, digest)
    except (KeyError, ValueError) as error:
        raise _damaged(file, f"its arrays do not fit each other ({error})") from error


def _damaged(file: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the kit is damaged: {reason}", where=str(file), fix="copy it again, or save it anew")


def _kit(told: Told, content: Arrays, digest: str) -> Kit:
    x, y = _floats(content["x"]), content["y"].astype(np.int64)
    pools = []
    for number, made in enumerate(told.attacks):
        own = {key[4:]: values for key, values in content.items() if key.startswith(f"{number:03d}.")}
        if own["x_adv"].shape[1:] != x.shape[1:] or len(own["index"]) != len(own["x_adv"]):
            raise ValueError(made.name)
        answers = Judged(own["prediction"], own["margin"]) if "margin" in own else None
        pools.append(Pool(made, own["index"].astype(np.int64), own["x_adv"].astype(np.float32), answers))
    if x.ndim != 4 or not len(x) == len(y) == len(content["index"]) == told.dataset.n:
        raise ValueError("images and labels")
    clean = Judged(content["source.prediction"], content["source.margin"]) if "source.margin" in content else None
    return Kit(told, x, y, content["index"], clean, tuple(pools), digest)


def _digest(text: str, content: Arrays) -> str:
    found = hashlib.sha256(text.encode())
    for key in sorted(content):
        values = np.ascontiguousarray(content[key])
        found.update(f"\0{key}\0{values.dtype.str}\0{values.shape}\0".encode())
        found.update(values.tobytes())
    return f"sha256:{found.hexdigest()}"
