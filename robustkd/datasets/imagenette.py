"""Imagenette: ten easy classes of ImageNet, 9,469 training pictures; the 3,925 of `val` are the test set.

Read in torchvision's layout, the folders `imagenette2-160`, `imagenette2-320` or `imagenette2` as unpacked: `train` and
`val` with one folder per WordNet id. The shorter edge is resized to `size` and the centre kept. A class is the position of
its id among the ten, in sorted order.

fast.ai; the pictures are ImageNet's (Deng et al., CVPR 2009), for non-commercial research.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets._pictures import centred, read_pixels, torchvision_datasets
from robustkd.datasets._pixels import Pixels
from robustkd.errors import ArtifactError

WORDNET = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
#: length of the shorter edge as torchvision calls it -> its folder
FOLDERS = {"160px": "imagenette2-160", "320px": "imagenette2-320", "full": "imagenette2"}
_UNPACK = "unpack the archive again"


class ImagenetteConfig(DatasetConfig, frozen=True):
    """Imagenette; its official `val` is the test split."""

    summary: ClassVar[str] = "Imagenette as unpacked under the data root, any of its three sizes; val is the test split"
    facts: ClassVar[Facts | None] = None  # the size is the user's
    name: Literal["imagenette"] = "imagenette"
    size: int = Field(160, ge=28, le=512, description="the shorter edge is resized to this and the centre kept, in pixels")

    def load(self, split: Split) -> ImageSet:
        """The official split, `val` for `test`, class by class in the order of the file names."""
        files, labels = self._listed(split)
        images = self.pixels(files, self.read, (3, self.size, self.size), fix=_UNPACK)
        return ImageSet(images, labels, tuple(WORDNET.values()), self.name, split)

    def read(self, file: Path) -> Pixels:
        """One picture as (3, size, size)."""
        return read_pixels(file, "RGB", centred(self.size))

    def _listed(self, split: Split) -> tuple[list[Path], np.ndarray[tuple[int], np.dtype[np.int64]]]:
        datasets = torchvision_datasets("Imagenette")
        root = self.folder()
        kind = self._kind(root)
        part = "train" if split == "train" else "val"
        base = root / FOLDERS[kind] / part
        try:
            data = datasets.Imagenette(root, split=part, size=kind)
        except (KeyError, OSError, RuntimeError) as error:
            raise ArtifactError(f"Imagenette's {part} cannot be listed: {error}", where=str(base), fix=_UNPACK) from error
        if data.wnids != list(WORDNET):
            lacking = ", ".join(sorted(set(WORDNET) - set(data.wnids)))
            raise ArtifactError(f"no folders of the classes {lacking}", where=str(base), fix=_UNPACK)
        return [Path(file) for file, _ in data._samples], np.asarray([label for _, label in data._samples], np.int64)

    def _kind(self, root: Path) -> str:
        """The smallest of the three that is there and does not have to be enlarged; failing that, the largest there is."""
        there = [kind for kind, folder in FOLDERS.items() if (root / folder).is_dir()]
        if not there:
            raise ArtifactError(
                "Imagenette is not here",
                where=str(root.absolute()),
                fix="unpack imagenette2-160.tgz, imagenette2-320.tgz or imagenette2.tgz of "
                "https://github.com/fastai/imagenette there, "
                "or point --data (ROBUSTKD_DATA) at the parent of imagenette2-160, imagenette2-320 or imagenette2",
            )
        edges = {"160px": 160, "320px": 320, "full": 512}
        return next((kind for kind in there if edges[kind] >= self.size), there[-1])


ENTRY = ImagenetteConfig
