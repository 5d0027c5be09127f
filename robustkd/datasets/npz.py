"""A user's own images in `.npz` files: `x` (uint8, or float in [0, 1]) and `y` (integers).

`x` is (N, H, W, C), (N, C, H, W) or grey (N, H, W). Several files make one split: a list of names, of patterns such as
`train-*.npz` (their files in the order of their names), or of both.
"""

from __future__ import annotations

import glob
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from robustkd.datasets._base import DatasetConfig, ImageSet, Split
from robustkd.errors import ArtifactError

MAX_CLASSES = 100_000
#: what NumPy and zipfile raise on damaged archives: lengths, methods and flags are believed before any check
_UNREADABLE = (
    OSError,
    ValueError,
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    MemoryError,
    SyntaxError,
    struct.error,
)


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[np.int64], tuple[str, ...]]:
    """Images (N, C, H, W), labels (N,) and class names, if any, of one file; nothing is unpickled.

    Raises:
        ArtifactError: the file is missing, damaged, or does not hold `x` and `y` as described.
    """
    try:
        with path.open("rb") as stream:  # np.load leaves a damaged file that it opened itself open
            arrays = np.load(stream, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an .npz archive")
            held = dict(arrays)
    except _UNREADABLE as error:
        # numpy takes whatever it does not know for a pickle, and offers to run it
        reason = "it is no .npz archive" if "contains pickled" in str(error) else error
        raise ArtifactError(f"cannot read {path.name}: {reason}", where=str(path), fix="give an .npz with x and y") from error
    if not {"x", "y"} <= held.keys():
        raise ArtifactError(f"{path.name} holds {sorted(held)}", where=str(path), fix="name the arrays x and y")
    names = tuple(str(c) for c in np.atleast_1d(held["classes"])) if "classes" in held else ()
    return _images(held["x"], path), _labels(held["y"], path), names


def _images(x: NDArray[Any], path: Path) -> NDArray[Any]:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim == 4 and x.shape[1] not in (1, 3):  # (N, H, W, 4) would pass for pictures of H channels
        raise ArtifactError(f"x has shape {x.shape}, not 1 or 3 channels", where=str(path), fix="store grey or RGB images")
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating):
            raise ArtifactError(f"x is {x.dtype}", where=str(path), fix="store x as uint8, or as float in [0, 1]")
        if x.size and not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
            raise ArtifactError("x is float but not in [0, 1]", where=str(path), fix="divide by 255, or store uint8")
        x = x.astype(np.float32)
    return np.ascontiguousarray(x)


def _labels(y: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ArtifactError(
            f"y has shape {y.shape} and type {y.dtype}",
            where=str(path),
            fix="store y as one integer class per image, not one-hot",
        )
    if y.size and y.max() >= MAX_CLASSES:
        raise ArtifactError(f"y holds the label {y.max()}", where=str(path), fix="number the classes from 0")
    return y.astype(np.int64)


Files = Annotated[tuple[Path, ...], BeforeValidator(lambda given: (given,) if isinstance(given, (str, Path)) else given)]


class NpzConfig(DatasetConfig, frozen=True):
    """Images from .npz files."""

    summary: ClassVar[str] = "your own .npz files with x and y; several files make one split"
    name: Literal["npz"] = "npz"
    train: Files = Field((), description="files of the training split: names or patterns")
    test: Files = Field((), description="files of the test split: names or patterns")
    classes: tuple[str, ...] = Field((), description="class names; left out, the labels' numbers")

    def load(self, split: Split) -> ImageSet:
        """All files of the split, in the order given."""
        files = self.train if split == "train" else self.test
        if not files:
            raise ArtifactError(f"no .npz files for the {split} split", where=f"dataset.{split}", fix="name at least one")
        parts = [read_npz(file) for given in files for file in self._resolve(given)]
        shapes = {part[0].shape[1:] for part in parts} | {part[0].dtype for part in parts}
        if len(shapes) > 2:
            raise ArtifactError(f"the files of {split} differ in shape or type", where=str(files[0]), fix="make them equal")
        if len({part[2] for part in parts}) > 1 and not self.classes:
            raise ArtifactError(f"the files of {split} differ in their class names", where=str(files[0]), fix="make them equal")
        labels = np.concatenate([part[1] for part in parts])
        names = self.classes or parts[0][2] or tuple(str(i) for i in range(int(labels.max(initial=0)) + 1))
        images = parts[0][0] if len(parts) == 1 else np.concatenate([part[0] for part in parts])
        return ImageSet(images, labels, names, self.name, split)

    def _resolve(self, given: Path) -> list[Path]:
        """The file of a name or the files of a pattern, under the data root or as given."""
        under, plain = self.folder() / given, given.expanduser()
        for path in (under, plain):
            if path.is_file():
                return [path]
        for pattern in (under, plain):
            if found := sorted(glob.glob(str(pattern))):  # noqa: PTH207  # Path.glob takes no absolute pattern
                return [Path(file) for file in found]
        if glob.has_magic(str(given)):
            raise ArtifactError(f"no file matches {given}", where=str(self.folder().absolute()), fix="check the pattern")
        return [plain]


ENTRY = NpzConfig
