"""Pixels that are not copied until they are asked for: picture files on disk, and some rows of an array in memory.

Both look like an array (N, C, H, W) to those who index them with row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustkd.errors import ArtifactError

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]
L = TypeVar("L", bound="Lazy")


class Lazy:
    """A choice of rows of something larger; subclasses know how to fetch them."""

    def __init__(self, rows: Rows, image: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self.rows, self.image, self.dtype = rows, image, dtype

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.rows), *self.image)

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    @property
    def nbytes(self) -> int:
        """Of all pixels, were they in memory."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> NDArray[Any]:
        rows = self.rows[index]
        return self._fetch(rows) if np.ndim(rows) else self._fetch(rows[None])[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return self._fetch(self.rows).astype(dtype or self.dtype, copy=False)

    def take(self: L, index: Rows) -> L:
        """Some of these rows, still not fetched."""
        part = copy(self)
        part.rows = self.rows[index]
        return part

    def _fetch(self, rows: Rows) -> NDArray[Any]:
        raise NotImplementedError


class View(Lazy):
    """Rows of an array that stays whole and is not copied."""

    def __init__(self, base: NDArray[Any], rows: Rows) -> None:
        channels, height, width = base.shape[1:]
        super().__init__(rows, (channels, height, width), base.dtype)
        self.base = base

    def _fetch(self, rows: Rows) -> NDArray[Any]:
        fetched: NDArray[Any] = self.base[rows]
        return fetched


class Pictures(Lazy):
    """Picture files, each decoded when it is asked for.

    Args:
        files: one per image.
        read: the pixels (C, H, W) of one file; it crosses over to other processes, so it must pickle.
        image: C, H, W that every file must have.
        fix: what to do about a file of another size.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[Path], Pixels], image: tuple[int, int, int], *, fix: str) -> None:
        super().__init__(np.arange(len(files)), image, np.dtype(np.uint8))
        self._files, self._read, self._fix = files, read, fix

    def _fetch(self, rows: Rows) -> Pixels:
        """All into one array made beforehand: a list to be stacked would hold every pixel twice.

        Raises:
            ArtifactError: a picture is damaged or has another size.
        """
        pixels = np.empty((len(rows), *self.image), np.uint8)
        for slot, row in enumerate(rows):
            picture = self._read(self._files[row])
            if picture.shape != self.image:
                raise self._odd(self._files[row], picture)
            pixels[slot] = picture
        return pixels

    def _odd(self, file: Path, picture: Pixels) -> ArtifactError:
        (_, height, width), (_, wanted_height, wanted_width) = picture.shape, self.image
        what = f"{file.name} is {width}x{height} pixels, not {wanted_width}x{wanted_height}"
        return ArtifactError(what, where=str(file), fix=self._fix)
