"""Fashion-MNIST: 28x28 grey pictures of clothing, ten classes, 60,000 training and 10,000 test images.

The full set is read from the user's disk (torchvision's layout, or the folder of Debian's package
dataset-fashion-mnist); where there is none, the embedded 10,000 + 2,000 images stand in, and the note says so.

Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017. MIT licence.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.errors import ArtifactError

CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
#: md5 of the unpacked idx files as first published; recompressed copies differ outside, not inside
MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
_EMBEDDED = Path(__file__).parent / "data" / "fashion_mnist_10k.npz.xz"


def read_idx(folder: Path, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images (N, 1, 28, 28) and labels (N,) of one split from the original idx files.

    Raises:
        ArtifactError: a file is missing, cannot be unpacked, or is not the published one.
    """
    stem = "train" if split == "train" else "t10k"
    images = _unpack(folder, f"{stem}-images-idx3-ubyte")
    labels = _unpack(folder, f"{stem}-labels-idx1-ubyte")
    pixels = np.frombuffer(bytearray(images), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def _unpack(folder: Path, name: str) -> bytes:
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        data = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(f"cannot read {name}: {error}", where=str(folder), fix="copy the file again") from error
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != MD5[name]:
        raise ArtifactError(f"{name} is not the published file", where=str(folder), fix="copy the file again")
    return data


def full_folder(root: Path) -> Path | None:
    """The folder of the full set: under the data root, or where Debian puts it."""
    for folder in (root / "FashionMNIST" / "raw", root / "fashion-mnist", root, SYSTEM):
        if any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
            return folder
    return None


@cache
def _embedded() -> bytes:
    """Both splits, unpacked once: an audit opens both, and a shard of one does so again to merge."""
    return lzma.decompress(_EMBEDDED.read_bytes())


def embedded(split: Split, name: str) -> ImageSet:
    """The subset inside the package: 10,000 training or 2,000 test images, balanced over the classes."""
    arrays: Any = np.load(io.BytesIO(_embedded()), allow_pickle=False)
    labels = arrays[f"{split}_y"].astype(np.int64)
    return ImageSet(arrays[f"{split}_x"], labels, CLASSES, name, split)


class FashionMNISTConfig(DatasetConfig, frozen=True):
    """Fashion-MNIST, the full set where it is on disk."""

    summary: ClassVar[str] = "Fashion-MNIST: the full set where it is on disk, otherwise the embedded subset"
    facts: ClassVar[Facts | None] = Facts((1, 28, 28), 10, train=60_000)
    name: Literal["fashion-mnist"] = "fashion-mnist"

    def load(self, split: Split) -> ImageSet:
        """The official split of the full set, or the embedded subset with a note."""
        if (folder := full_folder(self.folder())) is not None:
            images, labels = read_idx(folder, split)
            return ImageSet(images, labels, CLASSES, self.name, split)
        part = embedded(split, self.name)
        note = f"full Fashion-MNIST is not under {self.folder()}: using the embedded {len(part)} {split} images"
        return ImageSet(part.images, part.labels, CLASSES, self.name, split, note)


ENTRY = FashionMNISTConfig
