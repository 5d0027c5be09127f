"""SVHN: 32x32 colour pictures of house numbers, the digits 0 to 9, 73,257 training and 26,032 test images.

Read by torchvision from `train_32x32.mat` and `test_32x32.mat`, in the data root or in its `svhn`; torchvision checks the
md5 of each file first. The files call the digit 0 class 10; here it is class 0. The `extra` images are not read.

Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", NIPS workshop 2011.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets._pictures import torchvision_datasets
from robustkd.errors import ArtifactError, RequirementError

CLASSES = tuple("0123456789")


class SvhnConfig(DatasetConfig, frozen=True):
    """SVHN, cropped digits."""

    summary: ClassVar[str] = "SVHN, cropped digits, as the published .mat files under the data root"
    facts: ClassVar[Facts | None] = Facts((3, 32, 32), 10, train=73_257)
    name: Literal["svhn"] = "svhn"

    def load(self, split: Split) -> ImageSet:
        """The official split."""
        data = _read(self._base(split), split)
        images = np.ascontiguousarray(data.data)  # the file holds (H, W, C, N)
        return ImageSet(images, np.asarray(data.labels, np.int64), CLASSES, self.name, split)

    def _base(self, split: Split) -> Path:
        root, file = self.folder(), f"{split}_32x32.mat"
        for base in (root, root / "svhn", root / "SVHN"):
            if (base / file).is_file():
                return base
        raise ArtifactError(
            f"SVHN is not here: no {file}",
            where=str(root.absolute()),
            fix="put train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers there, "
            "or point --data (ROBUSTKD_DATA) at their folder",
        )


def _read(base: Path, split: Split) -> Any:
    datasets = torchvision_datasets("SVHN")
    try:
        return datasets.SVHN(base, split=split)
    except ImportError as error:
        raise RequirementError("SVHN's .mat files are read by scipy", where=str(error), fix="pip install scipy") from error
    except (RuntimeError, OSError) as error:
        file = base / f"{split}_32x32.mat"
        raise ArtifactError(f"{file.name} is not the published file", where=str(file), fix="copy the file again") from error


ENTRY = SvhnConfig
