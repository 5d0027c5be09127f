"""CIFAR-10: 32x32 colour pictures, ten classes, 50,000 training and 10,000 test images.

Read from disk in either official layout: `cifar-10-batches-bin` (plain records) or `cifar-10-batches-py`
(through torchvision, which checks the md5 of each file before it unpickles one).

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from robustkd.datasets._base import DatasetConfig, ImageSet, Split
from robustkd.errors import ArtifactError, RequirementError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32


class Cifar10Config(DatasetConfig, frozen=True):
    """CIFAR-10 in either of its official layouts."""

    summary: ClassVar[str] = "CIFAR-10 in its official binary or Python layout under the data root"
    name: Literal["cifar10"] = "cifar10"

    def load(self, split: Split) -> ImageSet:
        """The official split."""
        root = self.folder()
        if (root / "cifar-10-batches-bin").is_dir():
            return self._binary(root / "cifar-10-batches-bin", split)
        if (root / "cifar-10-batches-py").is_dir():
            return self._python(root, split)
        raise ArtifactError(
            "CIFAR-10 is not here",
            where=str(root.absolute()),
            fix="put cifar-10-batches-bin or cifar-10-batches-py there, or point --data (ROBUSTKD_DATA) at their parent",
        )

    def _binary(self, folder: Path, split: Split) -> ImageSet:
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        parts = []
        for file in (folder / name for name in names):
            if not file.is_file():
                raise ArtifactError(f"{file.name} is missing", where=str(folder), fix="unpack the archive again")
            data = np.fromfile(file, np.uint8)
            if not len(data) or len(data) % _RECORD:
                raise ArtifactError(f"{file.name} is cut short", where=str(folder), fix="unpack the archive again")
            parts.append(data.reshape(-1, _RECORD))
        records = np.concatenate(parts)
        images = records[:, 1:].reshape(-1, 3, 32, 32)
        return ImageSet(images, records[:, 0].astype(np.int64), CLASSES, self.name, split)

    def _python(self, root: Path, split: Split) -> ImageSet:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise RequirementError(
                "cifar-10-batches-py is read by torchvision, which does not import here",
                where=str(error),
                fix="pip install 'robustkd[train]', or use the cifar-10-batches-bin layout",
            ) from error
        try:
            data = CIFAR10(root, train=split == "train")
        except (RuntimeError, OSError, EOFError) as error:
            raise ArtifactError(f"cifar-10-batches-py: {error}", where=str(root), fix="unpack the archive again") from error
        images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
        return ImageSet(images, np.asarray(data.targets, np.int64), CLASSES, self.name, split)


ENTRY = Cifar10Config
