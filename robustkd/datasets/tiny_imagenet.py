"""Tiny-ImageNet: 64x64 colour pictures, 200 classes, 100,000 training images; the 10,000 of `val` are the test set.

Read from the official tree `tiny-imagenet-200`: `wnids.txt`, `words.txt`, `train/<wnid>/images/*.JPEG`, and `val` with
`val_annotations.txt`, or with one folder per class, as many people rearrange it. A class is the position of its
WordNet id in the sorted list of ids; the few grey pictures become RGB. The unlabelled `test` is not read.

Stanford CS231n; the images are ImageNet's (Deng et al., CVPR 2009), for non-commercial research.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets._pictures import read_pixels
from robustkd.datasets._pixels import Pixels
from robustkd.errors import ArtifactError

CLASSES, SIZE = 200, 64
_UNPACK = "unpack tiny-imagenet-200.zip again"
Labelled = list[tuple[Path, int]]


class TinyImagenetConfig(DatasetConfig, frozen=True):
    """Tiny-ImageNet-200; its official `val` is the test split."""

    summary: ClassVar[str] = "Tiny-ImageNet-200 as unpacked, under the data root; the official val is the test split"
    facts: ClassVar[Facts | None] = Facts((3, SIZE, SIZE), CLASSES, train=100_000)
    name: Literal["tiny-imagenet"] = "tiny-imagenet"

    def load(self, split: Split) -> ImageSet:
        """The official split, `val` for `test`."""
        base = self._base()
        wnids = _wnids(base)
        files = _train(base, wnids) if split == "train" else _val(base, wnids)
        labels = np.asarray([label for _, label in files], np.int64)
        images = self.pixels([file for file, _ in files], self.read, (3, SIZE, SIZE), fix=_UNPACK)
        return ImageSet(images, labels, _words(base, wnids), self.name, split)

    def read(self, file: Path) -> Pixels:
        """One picture as (3, H, W)."""
        return read_pixels(file, "RGB")

    def _base(self) -> Path:
        root = self.folder()
        for base in (root / "tiny-imagenet-200", root):
            if (base / "wnids.txt").is_file():
                return base
        raise ArtifactError(
            "Tiny-ImageNet is not here",
            where=str(root.absolute()),
            fix="unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there, "
            "or point --data (ROBUSTKD_DATA) at the parent of tiny-imagenet-200",
        )


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {file.name}: {error}", where=str(file), fix=_UNPACK) from error


def _wnids(base: Path) -> list[str]:
    """The WordNet ids in the order of the labels."""
    wnids = sorted({line.strip() for line in _lines(base / "wnids.txt")})
    if len(wnids) != CLASSES:
        raise ArtifactError(f"wnids.txt names {len(wnids)} classes, not {CLASSES}", where=str(base), fix=_UNPACK)
    return wnids


def _words(base: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each id, or the id where `words.txt` has none."""
    known: dict[str, str] = {}
    if (base / "words.txt").is_file():
        for line in _lines(base / "words.txt"):
            wnid, _, words = line.partition("\t")
            known[wnid] = words.split(",")[0].strip()
    return tuple(known.get(wnid) or wnid for wnid in wnids)


def _train(base: Path, wnids: list[str]) -> Labelled:
    return [(file, label) for label, wnid in enumerate(wnids) for file in _class_files(base / "train" / wnid)]


def _val(base: Path, wnids: list[str]) -> Labelled:
    """By the annotations, in their order; without them, one folder per class."""
    val = base / "val"
    if not (val / "val_annotations.txt").is_file() or not (val / "images").is_dir():
        return [(file, label) for label, wnid in enumerate(wnids) for file in _class_files(val / wnid)]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    found = []
    for number, line in enumerate(_lines(val / "val_annotations.txt"), start=1):
        name, wnid = (*line.split("\t"), "")[:2]
        if wnid not in label_of:
            where = f"{val / 'val_annotations.txt'}, line {number}"
            raise ArtifactError(f"{wnid or 'no id'} is not in wnids.txt", where=where, fix=_UNPACK)
        found.append((val / "images" / name, label_of[wnid]))
    return found


def _class_files(folder: Path) -> list[Path]:
    """The pictures of one class, in the order of their names: in the folder's `images`, or in the folder itself."""
    inner = folder / "images" if (folder / "images").is_dir() else folder
    files = sorted(file for file in inner.glob("*") if file.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if not files:
        raise ArtifactError("no pictures of this class", where=str(inner), fix=_UNPACK)
    return files


ENTRY = TinyImagenetConfig
