"""A user's own picture files, one sub-folder per class (the ImageFolder layout), through torchvision.

`<path>/train/<class>/*.png` and `<path>/test` (or `val`); where none of these exists, the path itself is one
split, used as `test`. The classes are the sub-folders' names in sorted order.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from robustkd.datasets._base import DatasetConfig, ImageSet, Split
from robustkd.datasets._pictures import centred, read_pixels, torchvision_datasets
from robustkd.datasets._pixels import Pixels
from robustkd.errors import ArtifactError

_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


class FolderConfig(DatasetConfig, frozen=True):
    """Picture files in ImageFolder layout."""

    summary: ClassVar[str] = "your own picture files, one sub-folder per class, under train/ and test/ (or val/)"
    name: Literal["folder"] = "folder"
    path: Path | None = Field(None, description="the folder, absolute or under the data root; left out, the data root")
    size: int | None = Field(None, ge=1, description="resize the shorter edge to this and crop the centre, in pixels")
    channels: Literal[1, 3] = Field(3, description="3 reads every picture as RGB, 1 as grey")

    def load(self, split: Split) -> ImageSet:
        """All pictures of the split, class by class, in the order of their names."""
        classes, found = _listed(self._split_folder(split))
        labels = np.asarray([label for _, label in found], np.int64)
        classes = self._agreed(split, classes)
        files = [file for file, _ in found]
        channels, height, width = self.read(files[0]).shape  # the first says what all have to be
        fix = "set dataset.size to resize and crop every picture; without it all have to be like the first"
        return ImageSet(self.pixels(files, self.read, (channels, height, width), fix=fix), labels, classes, self.name, split)

    def read(self, file: Path) -> Pixels:
        """One picture as (channels, H, W)."""
        return read_pixels(file, "RGB" if self.channels == 3 else "L", None if self.size is None else centred(self.size))

    def _base(self) -> Path:
        if self.path is None:
            return self.folder()
        under = self.folder() / self.path
        return under if under.is_dir() else self.path.expanduser()

    def _split_folder(self, split: Split) -> Path:
        base = self._base()
        if not base.is_dir():
            raise ArtifactError("there is no such folder", where=str(base.absolute()), fix="point dataset.path at it")
        for name in _SPLITS[split]:
            if (base / name).is_dir():
                return base / name
        if split == "test" and not (base / "train").is_dir():
            return base
        raise ArtifactError(
            f"the folder has no {split} split", where=str(base.absolute()), fix=f"put the class folders under {split}/"
        )

    def _agreed(self, split: Split, classes: tuple[str, ...]) -> tuple[str, ...]:
        """The classes, which must be those of the training split: a label means the same in both."""
        train = self._base() / "train"
        if split == "test" and train.is_dir():
            expected = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
            if classes != expected:
                odd = sorted(set(classes) ^ set(expected))
                raise ArtifactError(
                    f"train and test differ in the classes {', '.join(odd)}",
                    where=str(self._base().absolute()),
                    fix="give both splits the same class folders",
                )
        return classes


def _listed(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, and every picture with its label."""
    datasets = torchvision_datasets("a picture folder")
    try:
        found = datasets.ImageFolder(str(folder))
    except OSError as error:
        raise ArtifactError(
            f"no pictures in ImageFolder layout: {error}", where=str(folder), fix="put the files in one folder per class"
        ) from error
    return tuple(found.classes), [(Path(file), int(label)) for file, label in found.samples]


ENTRY = FolderConfig
