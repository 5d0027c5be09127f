"""The contract of the data set shelf: a name and a root become uint8 images, labels and class names."""

from __future__ import annotations

import hashlib
import os
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from robustkd.errors import ArtifactError

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ImageSet:
    """One split in memory.

    Attributes:
        images: (N, C, H, W), uint8; or float32 in [0, 1] where a user's file holds floats.
        labels: (N,), int64, each in [0, len(classes)).
        classes: the class names, in the order of the labels.
        name: what it is, for reports.
        split: `train` or `test`.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    name: str
    split: Split
    note: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ArtifactError(f"data set {self.name} ({self.split}): {problem}", fix="see `robustkd list datasets`")

    def _problem(self) -> str:
        if self.images.ndim != 4:
            return f"images have shape {self.images.shape}, not (N, C, H, W)"
        if len(self.images) != len(self.labels):
            return f"{len(self.images)} images but {len(self.labels)} labels"
        if not len(self.labels):
            return "no images"
        if self.images.dtype not in (np.uint8, np.float32):
            return f"images are {self.images.dtype}, not uint8 or float in [0, 1]"
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            return f"labels run from {low} to {high}, but there are {len(self.classes)} classes"
        return ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def sha256(self) -> str:
        """Digest of pixels and labels in order, so that two runs can prove they saw the same images."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def take(self, index: NDArray[np.int64]) -> ImageSet:
        """The images of an index array, in its order; unlike a data set it may be empty (nothing held out)."""
        part = copy(self)
        object.__setattr__(part, "images", self.images[index])
        object.__setattr__(part, "labels", self.labels[index])
        return part

    def floats(self) -> NDArray[np.float32]:
        """The images as float32 in [0, 1]."""
        if self.images.dtype == np.uint8:
            scaled: NDArray[np.float32] = self.images.astype(np.float32) / np.float32(255)
            return scaled
        floats: NDArray[np.float32] = self.images.astype(np.float32, copy=False)
        return floats


@dataclass(frozen=True)
class Facts:
    """What is known of a published data set before a file of it is read: (channels, height, width) and class count."""

    shape: tuple[int, int, int]
    classes: int


class DatasetConfig(BaseModel, frozen=True, extra="forbid"):
    """What every data set has; subclasses say where the images are."""

    summary: ClassVar[str] = ""
    facts: ClassVar[Facts | None] = None
    name: str
    root: Path | None = Field(None, description="where the files are; left out, --data or ROBUSTKD_DATA")
    holdout: int = Field(1000, ge=0, description="training images held out by seed for checkpoint selection")
    train_n: int | None = Field(None, ge=1, description="use only this many training images, chosen by seed")

    def load(self, split: Split) -> ImageSet:
        """Read one split into memory."""
        raise NotImplementedError

    def folder(self) -> Path:
        """The data root: the recipe's, then ROBUSTKD_DATA, then ./data."""
        return (self.root or Path(os.environ.get("ROBUSTKD_DATA", "data"))).expanduser()


def balanced(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Indices of `n` images with the classes as equal as can be, in a seeded random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    by_rank = order[np.argsort(rank[order], kind="stable")]
    chosen: NDArray[np.int64] = rng.permutation(by_rank[:n])
    return chosen
