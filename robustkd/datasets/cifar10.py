"""CIFAR-10: 32x32 colour pictures, ten classes, 50,000 training and 10,000 test images.

Read from disk in either official layout: `cifar-10-batches-bin` (plain records) or `cifar-10-batches-py`
(through torchvision, which checks the md5 of each file before it unpickles one).

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets._cifar import planes, read_python, read_records
from robustkd.errors import ArtifactError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10Config(DatasetConfig, frozen=True):
    """CIFAR-10 in either of its official layouts."""

    summary: ClassVar[str] = "CIFAR-10 in its official binary or Python layout under the data root"
    facts: ClassVar[Facts | None] = Facts((3, 32, 32), 10, train=50_000)
    name: Literal["cifar10"] = "cifar10"

    def load(self, split: Split) -> ImageSet:
        """The official split."""
        root = self.folder()
        if (root / "cifar-10-batches-bin").is_dir():
            return self._binary(root / "cifar-10-batches-bin", split)
        if (root / "cifar-10-batches-py").is_dir():
            data = read_python(root, split, name="CIFAR10", layout="cifar-10-batches-py")
            return ImageSet(planes(data), np.asarray(data.targets, np.int64), CLASSES, self.name, split)
        raise ArtifactError(
            "CIFAR-10 is not here",
            where=str(root.absolute()),
            fix="unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there, "
            "or point --data (ROBUSTKD_DATA) at the parent of cifar-10-batches-bin or cifar-10-batches-py",
        )

    def _binary(self, folder: Path, split: Split) -> ImageSet:
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        images, labels = read_records(folder, names, labels=1)
        return ImageSet(images, labels[:, 0].astype(np.int64), CLASSES, self.name, split)


ENTRY = Cifar10Config
