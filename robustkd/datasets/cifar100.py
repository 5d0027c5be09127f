"""CIFAR-100: 32x32 colour pictures, a hundred classes, 50,000 training and 10,000 test images.

Read from disk in either official layout: `cifar-100-binary` (records of coarse label, fine label, pixels; the names
in `fine_label_names.txt`) or `cifar-100-python` (through torchvision, which checks the md5 of each file before it
unpickles one). The labels are the fine ones.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets._cifar import planes, read_python, read_records
from robustkd.errors import ArtifactError

_NAMES = "fine_label_names.txt"


class Cifar100Config(DatasetConfig, frozen=True):
    """CIFAR-100 with its fine labels, in either of its official layouts."""

    summary: ClassVar[str] = "CIFAR-100, fine labels, in its official binary or Python layout under the data root"
    facts: ClassVar[Facts | None] = Facts((3, 32, 32), 100, train=50_000)
    name: Literal["cifar100"] = "cifar100"

    def load(self, split: Split) -> ImageSet:
        """The official split."""
        root = self.folder()
        if (root / "cifar-100-binary").is_dir():
            return self._binary(root / "cifar-100-binary", split)
        if (root / "cifar-100-python").is_dir():
            data = read_python(root, split, name="CIFAR100", layout="cifar-100-python")
            return ImageSet(planes(data), np.asarray(data.targets, np.int64), tuple(data.classes), self.name, split)
        raise ArtifactError(
            "CIFAR-100 is not here",
            where=str(root.absolute()),
            fix="unpack cifar-100-binary.tar.gz or cifar-100-python.tar.gz of "
            "https://www.cs.toronto.edu/~kriz/cifar.html there, "
            "or point --data (ROBUSTKD_DATA) at the parent of cifar-100-binary or cifar-100-python",
        )

    def _binary(self, folder: Path, split: Split) -> ImageSet:
        images, labels = read_records(folder, [f"{split}.bin"], labels=2)
        return ImageSet(images, labels[:, 1].astype(np.int64), _names(folder), self.name, split)


def _names(folder: Path) -> tuple[str, ...]:
    """The hundred fine class names, in the order of the labels."""
    try:
        names = tuple((folder / _NAMES).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {_NAMES}: {error}", where=str(folder), fix="unpack the archive again") from error
    if len(names) != 100:
        raise ArtifactError(f"{_NAMES} holds {len(names)} names, not 100", where=str(folder), fix="unpack the archive again")
    return names


ENTRY = Cifar100Config
