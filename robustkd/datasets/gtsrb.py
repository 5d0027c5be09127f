"""GTSRB: German traffic signs, 43 classes, 26,640 training and 12,630 test pictures of 15 to 250 pixels.

Read in torchvision's layout: `gtsrb/GTSRB/Training/<class>/*.ppm`, `gtsrb/GTSRB/Final_Test/Images/*.ppm` and
`gtsrb/GT-final_test.csv`. Whole pictures are resized to a square, as is usual for signs: they are nearly square, and a crop
would cut the rim that tells one sign from another.

Stallkamp et al., "Man vs. computer: Benchmarking machine learning algorithms for traffic sign recognition", Neural
Networks 32, 2012.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets._pictures import read_pixels, squeezed, torchvision_datasets
from robustkd.datasets._pixels import Pixels
from robustkd.errors import ArtifactError

CLASSES = (
    *(f"speed limit {limit} km/h" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no overtaking",
    "no overtaking by trucks",
    "right of way at next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "danger",
    "bend left",
    "bend right",
    "double bend",
    "uneven road",
    "slippery road",
    "road narrows",
    "road works",
    "traffic lights",
    "pedestrians",
    "children",
    "bicycles",
    "snow",
    "wild animals",
    "end of all limits",
    "turn right",
    "turn left",
    "straight on",
    "straight on or right",
    "straight on or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking by trucks",
)
_UNPACK = "unpack the archives again, or let torchvision.datasets.GTSRB(root, split, download=True) do it"


class GtsrbConfig(DatasetConfig, frozen=True):
    """The German Traffic Sign Recognition Benchmark."""

    summary: ClassVar[str] = "German traffic signs in torchvision's layout under the data root, resized to a square"
    facts: ClassVar[Facts | None] = None  # the size is the user's
    name: Literal["gtsrb"] = "gtsrb"
    size: int = Field(32, ge=8, le=512, description="side of the square every picture is resized to, in pixels")

    def load(self, split: Split) -> ImageSet:
        """The official split, in the order of the files (train) or of the list of answers (test)."""
        found = _found(self.folder(), split)
        labels = np.asarray([label for _, label in found], np.int64)
        images = self.pixels([file for file, _ in found], self.read, (3, self.size, self.size), fix=_UNPACK)
        return ImageSet(images, labels, CLASSES, self.name, split)

    def read(self, file: Path) -> Pixels:
        """One picture as (3, size, size)."""
        return read_pixels(file, "RGB", squeezed(self.size))


def _found(root: Path, split: Split) -> list[tuple[Path, int]]:
    """Every picture with its class."""
    datasets = torchvision_datasets("GTSRB")
    try:
        data = datasets.GTSRB(root, split=split)
    except RuntimeError as error:
        where = str((root / "gtsrb").absolute())
        fix = (
            "let torchvision.datasets.GTSRB(root, split, download=True) fetch train and test, "
            "or point --data (ROBUSTKD_DATA) at the parent of its folder gtsrb"
        )
        raise ArtifactError(f"GTSRB is not here: no {split} pictures", where=where, fix=fix) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"GTSRB cannot be listed: {error}", where=str(root / "gtsrb"), fix=_UNPACK) from error
    if split == "test":
        return [(Path(file), int(label)) for file, label in data._samples]
    # torchvision numbers the folders it finds: with one missing, all labels behind it would be wrong
    found = [(Path(file), _number(Path(file).parent)) for file, _ in data._samples]
    if missing := sorted(set(range(len(CLASSES))) - {label for _, label in found}):
        raise ArtifactError(f"class {missing[0]:05d} has no pictures", where=str(root / "gtsrb"), fix=_UNPACK)
    return found


def _number(folder: Path) -> int:
    if folder.name.isdigit() and int(folder.name) < len(CLASSES):
        return int(folder.name)
    raise ArtifactError(f"{folder.name} is no class of GTSRB, 00000 to 00042", where=str(folder), fix=_UNPACK)


ENTRY = GtsrbConfig
