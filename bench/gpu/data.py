"""CIFAR-10 as train.npz and test.npz: python -m bench.gpu.data SOURCE... --output FOLDER

A SOURCE is a data root with the official files (`cifar-10-batches-py` or `-bin`), or a folder with the repository's optional
real images (`cifar10_train_1.npz`, ...; tests/real_data.py says what they hold). Several may each hold a part; files that
come later, in another call, are added to what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkd.datasets._open import open_dataset
from robustkd.errors import ArtifactError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Images(NamedTuple):
    """Pictures (N, C, H, W) uint8 and their labels (N,)."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]


def main(argv: list[str]) -> int:
    told = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    told.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    told.add_argument("--output", type=Path, required=True)
    asked = told.parse_args(argv)
    for split in ("train", "test"):
        file = asked.output / f"{split}.npz"
        parts = held(file)
        for source in asked.sources:
            for part in read(source, split):
                parts.setdefault(hashlib.sha256(part.x.tobytes()).hexdigest(), part)
        if parts:
            write(file, parts)
        print(f"{split}: {sum(len(part.y) for part in parts.values())} images")
    return 0


def read(source: Path, split: str) -> list[Images]:
    """What a folder holds of a split: the official files, or parts of the real images."""
    try:
        found = open_dataset({"name": "cifar10", "root": str(source)}).load(split)
        return [Images(np.asarray(found.images), found.labels)]
    except ArtifactError:
        from tests.real_data import read_grids

        parts = []
        for file in sorted(source.rglob(f"cifar10_{split}_*.npz")):
            pictures, labels = read_grids(file)
            parts.append(Images(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)), labels))
        return parts


def held(file: Path) -> dict[str, Images]:
    """The parts that were written before, by digest."""
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        if "parts" not in arrays:
            raise SystemExit(f"{file} was not made by this script: it stays as it is; choose another --output")
        x, y = arrays["x"], arrays["y"].astype(np.int64)
        names, cuts = arrays["parts"].tolist(), np.cumsum(arrays["lengths"])[:-1]
    return {name: Images(*pair) for name, *pair in zip(names, np.split(x, cuts), np.split(y, cuts), strict=True)}


def write(file: Path, parts: dict[str, Images]) -> None:
    """All parts in their order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    x, y = (np.concatenate([part[place] for part in parts.values()]) for place in (0, 1))
    lengths = [len(part.y) for part in parts.values()]
    np.savez(file, x=x, y=y, classes=np.array(CLASSES), parts=np.array(list(parts)), lengths=np.array(lengths))


def write_small(folder: Path, *, train: int = 300, test: int = 60) -> None:
    """A few of the embedded images, for dry runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", train), ("test", test)):
        found = open_dataset("fashion-mnist-10k").load(split).take(np.arange(n))
        np.savez(folder / f"{split}.npz", x=np.asarray(found.images), y=found.labels, classes=np.array(found.classes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
