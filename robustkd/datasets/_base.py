"""The contract of the data set shelf: a name and a root become uint8 images, labels and class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from robustkd.datasets._pixels import Lazy, Pictures, Pixels, View
from robustkd.errors import ArtifactError

Split = Literal["train", "test"]
Stream = Literal["auto", "always", "never"]
STREAM_ABOVE = 2 * 2**30
"""Bytes of pixels above which `auto` streams: what fits beside a network on a common GPU stays in memory."""
_CHUNK = 1024


@dataclass(frozen=True)
class ImageSet:
    """One split.

    Attributes:
        images: (N, C, H, W), uint8; or float32 in [0, 1] where a user's file holds floats. An array in memory, or rows that
            are fetched when they are indexed.
        labels: (N,), int64, each in [0, len(classes)).
        classes: the class names, in the order of the labels.
        name: what it is, for reports.
        split: `train` or `test`.
    """

    images: NDArray[Any] | Lazy
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    name: str
    split: Split
    note: str = ""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ArtifactError(
                f"data set {self.name} ({self.split}): {problem}", where=self.name, fix="see `robustkd list datasets`"
            )

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
        digest = hashlib.sha256()
        for first in range(0, len(self), _CHUNK):
            digest.update(np.ascontiguousarray(self.images[first : first + _CHUNK]).data)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def take(self, index: NDArray[np.int64]) -> ImageSet:
        """The images of an index array, in its order; unlike a data set it may be empty (nothing held out)."""
        images = self.images.take(index) if isinstance(self.images, Lazy) else self.images[index]
        return self._with(images, self.labels[index])

    def share(self, index: NDArray[np.int64]) -> ImageSet:
        """As `take`, but without a second copy of the pixels where most of them are taken."""
        if isinstance(self.images, Lazy) or 2 * len(index) < len(self):
            return self.take(index)
        return self._with(View(self.images, index), self.labels[index])

    def in_memory(self) -> ImageSet:
        """The same, with every pixel fetched."""
        return self._with(np.asarray(self.images), self.labels)

    def _with(self, images: NDArray[Any] | Lazy, labels: NDArray[np.int64]) -> ImageSet:
        part = copy(self)
        object.__setattr__(part, "images", images)
        object.__setattr__(part, "labels", labels)
        return part

    def floats(self) -> NDArray[np.float32]:
        """The images as float32 in [0, 1]."""
        images = np.asarray(self.images)
        floats: NDArray[np.float32] = images.astype(np.float32, copy=False)
        return floats / np.float32(255) if images.dtype == np.uint8 else floats


@dataclass(frozen=True)
class Facts:
    """What is known of a published data set before a file of it is read.

    Attributes:
        shape: channels, height, width.
        classes: their number.
        train: number of training images.
    """

    shape: tuple[int, int, int]
    classes: int
    train: int | None = None


class DatasetConfig(BaseModel, frozen=True, extra="forbid"):
    """What every data set has; subclasses say where the images are."""

    summary: ClassVar[str] = ""
    facts: ClassVar[Facts | None] = None
    name: str
    root: Path | None = Field(None, description="where the files are; left out, --data or ROBUSTKD_DATA")
    holdout: int = Field(1000, ge=0, description="training images held out by seed for checkpoint selection")
    train_n: int | None = Field(None, ge=1, description="use only this many training images, chosen by seed")
    stream: Stream = Field(
        "auto", description="read images while training instead of holding them on the device; auto: above 2 GiB of pixels"
    )
    workers: int | None = Field(None, ge=0, description="processes that decode streamed pictures; left out: by idle cores")

    def load(self, split: Split) -> ImageSet:
        """Read one split: into memory, or as pictures to be streamed."""
        raise NotImplementedError

    def streams(self, nbytes: int) -> bool:
        """Whether so many bytes of pixels are to be read while training."""
        return self.stream == "always" or (self.stream == "auto" and nbytes > STREAM_ABOVE)

    def pixels(
        self, files: Sequence[Path], read: Callable[[Path], Pixels], image: tuple[int, int, int], *, fix: str
    ) -> NDArray[Any] | Lazy:
        """The pixels of picture files, in memory where they are not streamed; the arguments are those of `Pictures`."""
        pictures = Pictures(files, read, image, fix=fix)
        return pictures if self.streams(pictures.nbytes) else np.asarray(pictures)

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
