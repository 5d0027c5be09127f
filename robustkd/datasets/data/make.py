"""Make the embedded subset of Fashion-MNIST from the original idx files.

    python robustkd/datasets/data/make.py FOLDER

FOLDER holds `train-images-idx3-ubyte.gz` and its three siblings, for example as Debian's package
dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist. The choice is balanced over the
classes and made by a fixed seed, so the output is the same everywhere.
"""

from __future__ import annotations

import io
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np

from robustkd.datasets._base import Split, balanced
from robustkd.datasets.fashion_mnist import read_idx

SEED, COUNTS = 20261121, {"train": 10_000, "test": 2_000}


def main(folder: Path) -> None:
    """Write `fashion_mnist_10k.npz.xz` beside this script."""
    arrays: dict[str, Any] = {}
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        images, labels = read_idx(folder, split)
        index = np.sort(balanced(labels, COUNTS[split], SEED))
        arrays |= {f"{split}_x": images[index], f"{split}_y": labels[index].astype(np.uint8)}
        arrays[f"{split}_index"] = index.astype(np.int32)
    plain = io.BytesIO()
    np.savez(plain, **arrays)
    packed = lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    Path(__file__).with_name("fashion_mnist_10k.npz.xz").write_bytes(packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
