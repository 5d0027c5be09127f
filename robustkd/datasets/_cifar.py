"""What CIFAR-10 and CIFAR-100 share: records of label bytes and 3x32x32 planes, or torchvision's reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustkd.catalog import needed
from robustkd.datasets._base import Split
from robustkd.errors import ArtifactError

_PIXELS = 3 * 32 * 32
_UNPACK = "unpack the archive again"


def read_records(folder: Path, names: list[str], *, labels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 3, 32, 32) and label bytes (N, labels) of files of plain records, one after the other.

    Raises:
        ArtifactError: a file is missing or does not hold whole records.
    """
    parts = []
    for file in (folder / name for name in names):
        if not file.is_file():
            raise ArtifactError(f"{file.name} is missing", where=str(folder), fix=_UNPACK)
        data = np.fromfile(file, np.uint8)
        if not len(data) or len(data) % (labels + _PIXELS):
            raise ArtifactError(f"{file.name} is cut short", where=str(folder), fix=_UNPACK)
        parts.append(data.reshape(-1, labels + _PIXELS))
    records = np.concatenate(parts)
    # a copy of its own: a view would keep the records, and be copied again on its way to the device
    return np.ascontiguousarray(records[:, labels:]).reshape(-1, 3, 32, 32), records[:, :labels].copy()


def read_python(root: Path, split: Split, *, name: Literal["CIFAR10", "CIFAR100"], layout: str) -> Any:
    """Torchvision's data set of the pickled layout; it checks the md5 of each file before it unpickles one.

    Raises:
        RequirementError: torchvision does not import.
        ArtifactError: a file is missing or is not the published one.
    """
    fix = "pip install 'robustkd[train]', or use the binary layout"
    datasets = needed("torchvision.datasets", f"{layout} is read by torchvision", fix=fix)
    try:
        return getattr(datasets, name)(root, train=split == "train")
    except (RuntimeError, OSError, EOFError) as error:
        raise ArtifactError(f"{layout}: {error}", where=str(root), fix=_UNPACK) from error


def planes(data: Any) -> NDArray[np.uint8]:
    """Torchvision's (N, 32, 32, 3) as (N, 3, 32, 32)."""
    images: NDArray[np.uint8] = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    return images
