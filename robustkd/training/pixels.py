"""Where batches get their stored pixels from: one tensor on the device, or a DataLoader that reads ahead.

Both hand out the same rows in the same order, unaugmented, so that a run does not depend on which of them it uses.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustkd.datasets._base import STREAM_ABOVE, ImageSet, Stream
from robustkd.datasets._pixels import Pictures, View
from robustkd.errors import RobustKDError

Rows = NDArray[np.int64]
Refusal: TypeAlias = "tuple[type[RobustKDError], str, str, str]"
MOST_WORKERS = 4


class InMemory:
    """All stored pixels as one tensor on a device."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        pixels = images.images
        self._rows: Rows | None = pixels.rows if isinstance(pixels, View) else None
        base = np.ascontiguousarray(pixels.base if isinstance(pixels, View) else pixels)
        self._pixels = torch.from_numpy(base if base.flags.writeable else base.copy()).to(device)

    def batches(self, picks: Sequence[Rows]) -> Iterator[Tensor]:
        """Stored pixels (B, C, H, W) of each choice of rows."""
        for rows in picks:
            inside = rows if self._rows is None else self._rows[rows]
            yield self._pixels[torch.from_numpy(inside).to(self._pixels.device)]


class Streamed:
    """Stored pixels read while training, a few batches ahead.

    Args:
        images: the training images, wherever they are.
        device: where the batches go.
        workers: processes that read; left out, one for each core but one, at most four, and none where nothing has to be
            decoded.
    """

    def __init__(self, images: ImageSet, device: torch.device, workers: int | None) -> None:
        self._source, self._device = _Source(images), device
        decodes = isinstance(images.images, Pictures)
        self._workers = (min(MOST_WORKERS, _cores() - 1) if decodes else 0) if workers is None else workers

    def batches(self, picks: Sequence[Rows]) -> Iterator[Tensor]:
        """Stored pixels (B, C, H, W) of each choice of rows.

        Raises:
            ArtifactError: a picture cannot be read.
        """
        loader: DataLoader[Any] = DataLoader(
            self._source,
            batch_size=None,  # a choice of rows is a batch already
            sampler=picks,
            num_workers=self._workers,
            collate_fn=_unchanged,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # otherwise it would draw from the generator of the run
            worker_init_fn=_begin_worker,
        )
        for found in loader:
            if not isinstance(found, Tensor):
                kind, what, where, fix = found
                raise kind(what, where=where, fix=fix)
            yield found.to(self._device, non_blocking=True)


class _Source(Dataset[Any]):
    """Images by rows. An error crosses between processes as a value: torch would rebuild it from its message alone."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images.images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: Any) -> Tensor | Refusal:
        try:
            return torch.from_numpy(np.ascontiguousarray(self._images[rows]))
        except RobustKDError as error:
            return type(error), error.what, error.where, error.fix


def stored(images: ImageSet, device: torch.device, *, stream: Stream, workers: int | None) -> InMemory | Streamed:
    """The source of stored pixels that `dataset.stream` asks for; `auto` goes by size."""
    pixels = images.images
    wanted = isinstance(pixels, Pictures) or stream == "always" or (stream == "auto" and pixels.nbytes > STREAM_ABOVE)
    return Streamed(images, device, workers) if wanted else InMemory(images, device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unchanged(found: Any) -> Any:
    return found


def _begin_worker(index: int) -> None:
    """Ctrl-C reaches every process of a terminal: the training process alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
