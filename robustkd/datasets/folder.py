"""A user's own picture files, one sub-folder per class (the ImageFolder layout), through torchvision.

`<path>/train/<class>/*.png` and `<path>/test` (or `val`); where none of these exists, the path itself is one
split, used as `test`. The classes are the sub-folders' names in sorted order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from robustkd.datasets._base import DatasetConfig, ImageSet, Split
from robustkd.datasets._pictures import open_picture
from robustkd.errors import ArtifactError, RequirementError

Pixels = NDArray[np.uint8]
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
        classes, files = _listed(self._split_folder(split))
        pictures = [self._read(file) for file, _ in files]
        self._check_equal(pictures, files)
        labels = np.asarray([label for _, label in files], np.int64)
        return ImageSet(np.stack(pictures), labels, self._agreed(split, classes), self.name, split)

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

    def _read(self, file: Path) -> Pixels:
        """One picture as (channels, H, W)."""
        picture: Any = open_picture(file, "RGB" if self.channels == 3 else "L")
        if self.size is not None:
            picture = _resizer(self.size)(picture)
        pixels = np.asarray(picture, np.uint8)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _check_equal(self, pictures: list[Pixels], files: list[tuple[Path, int]]) -> None:
        for picture, (file, _) in zip(pictures, files, strict=True):
            if picture.shape != pictures[0].shape:
                (_, height, width), (_, first_height, first_width) = picture.shape, pictures[0].shape
                raise ArtifactError(
                    f"{file.name} is {width}x{height} pixels, the pictures before it {first_width}x{first_height}",
                    where=str(file),
                    fix="set dataset.size to resize and crop every picture",
                )


def _listed(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, and every picture with its label."""
    try:
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:  # a wheel for another torch fails with RuntimeError
        raise _missing(error) from error
    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise ArtifactError(
            f"no pictures in ImageFolder layout: {error}", where=str(folder), fix="put the files in one folder per class"
        ) from error
    return tuple(found.classes), [(Path(file), int(label)) for file, label in found.samples]


def _resizer(size: int) -> Callable[[Any], Any]:
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:
        raise _missing(error) from error
    transform: Callable[[Any], Any] = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    return transform


def _missing(error: Exception) -> RequirementError:
    return RequirementError(
        "picture folders are read by torchvision, which does not import here",
        where=str(error),
        fix="pip install 'robustkd[train]', or store the images as .npz",
    )


ENTRY = FolderConfig
