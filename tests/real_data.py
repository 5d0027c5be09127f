"""The optional folder of real images, turned into what a user has: official CIFAR-10 files, or .npz.

The folder is ROBUSTKD_TEST_DATA, or `../shared/data` relative to the repository root; it holds
`cifar10/cifar10_train_<1-5>.npz` and `cifar10/cifar10_test_0000_4999.npz`, each a row of lossless WebP pictures
that tile a grid of images. Decoded, the training parts are byte for byte the official binary files.
"""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
PART = 10_000

#: SHA-1 of the official cifar-10-batches-bin files, as published with the data set
CIFAR10_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
}


def data_folder() -> Path | None:
    """The folder of real data, where there is one."""
    given = os.environ.get("ROBUSTKD_TEST_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def need_data(*files: str) -> Path:
    """The folder of real data, or skip with the name of what is missing."""
    folder = data_folder()
    if folder is None:
        pytest.skip("no folder of real data: set ROBUSTKD_TEST_DATA")
    for file in files:
        if not (folder / file).is_file():
            pytest.skip(f"the folder of real data has no {file}")
    return folder


def read_grids(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, H, W, C) uint8 and labels (N,) of one file of tiled WebP pictures."""
    from PIL import Image

    with np.load(file, allow_pickle=False) as held:
        arrays: dict[str, Any] = dict(held)
    tile, columns, each = int(arrays["tile"]), int(arrays["cols"]), int(arrays["per_stream"])
    offsets, labels = arrays["offsets"], arrays["labels"].astype(np.int64)
    images = []
    for index, (start, stop) in enumerate(itertools.pairwise(offsets)):
        packed = io.BytesIO(arrays["webp"][start:stop].tobytes())
        grid = np.asarray(Image.open(packed).convert("RGB"))
        tiles = grid.reshape(-1, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        images.append(tiles[: min(each, len(labels) - index * each)])
    return np.concatenate(images), labels


def _train_file(part: int) -> str:
    return f"cifar10/cifar10_train_{part}.npz"


TEST_FILE = "cifar10/cifar10_test_0000_4999.npz"


def cifar10_npz(folder: Path, *, train_parts: int = 1) -> tuple[Path, Path]:
    """Write `train.npz` and `test.npz` (x uint8 (N, 3, 32, 32), y) into `folder`; skips where there is no data.

    Args:
        folder: where the two files go.
        train_parts: how many of the five parts of 10,000 training images.
    """
    names = [_train_file(part) for part in range(1, train_parts + 1)]
    source = need_data(*names, TEST_FILE)
    written = []
    for target, files in (("train.npz", names), ("test.npz", [TEST_FILE])):
        parts = [read_grids(source / name) for name in files]
        images = np.concatenate([images for images, _ in parts]).transpose(0, 3, 1, 2)
        path = folder / target
        np.savez(path, x=np.ascontiguousarray(images), y=np.concatenate([labels for _, labels in parts]))
        written.append(path)
    return written[0], written[1]


def cifar10_binary(folder: Path, *, parts: int = 5) -> Path:
    """Write `cifar-10-batches-bin` into `folder`: official training files, and the 5,000 test images there are."""
    names = {f"data_batch_{part}.bin": _train_file(part) for part in range(1, parts + 1)}
    source = need_data(*names.values(), TEST_FILE)
    target = folder / "cifar-10-batches-bin"
    target.mkdir(parents=True, exist_ok=True)
    for name, file in (names | {"test_batch.bin": TEST_FILE}).items():
        images, labels = read_grids(source / file)
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        records = np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)
        (target / name).write_bytes(records.tobytes())
    return target


CIFAR100_FILES = {"train.bin": "cifar100/cifar100_train_1.npz", "test.bin": "cifar100/cifar100_test_0000_4999.npz"}


def cifar100_binary(folder: Path) -> Path:
    """Write `cifar-100-binary` into `folder`: real images with both labels, a part of each official split."""
    source = need_data(*CIFAR100_FILES.values())
    target = folder / "cifar-100-binary"
    target.mkdir(parents=True, exist_ok=True)
    for name, file in CIFAR100_FILES.items():
        images, fine = read_grids(source / file)
        with np.load(source / file, allow_pickle=False) as held:
            coarse, names = held["fine_to_coarse"][fine], held["class_names"].astype(str)
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        records = np.concatenate([coarse[:, None], fine.astype(np.uint8)[:, None], pixels], axis=1)
        (target / name).write_bytes(records.astype(np.uint8).tobytes())
    (target / "fine_label_names.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    return target


TINY_FILES = ("tiny_imagenet/tiny_imagenet_train_3000.npz", "tiny_imagenet/tiny_imagenet_val_0000_4999.npz")


def tiny_imagenet(folder: Path) -> Path:
    """Write the official tree `tiny-imagenet-200` into `folder`: original JPEG files, 3,000 of train, 5,000 of val."""
    source = need_data(*TINY_FILES)
    base = folder / "tiny-imagenet-200"
    train, val = (_jpegs(source / file) for file in TINY_FILES)
    wnids: list[str] = train["wnids"].astype(str).tolist()
    for wnid in wnids:
        (base / "train" / wnid / "images").mkdir(parents=True)
    (base / "val" / "images").mkdir(parents=True)
    # the official list is in no order
    (base / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(wnids)))
    words = zip(wnids, val["class_names"].astype(str), strict=True)
    (base / "words.txt").write_text("".join(f"{wnid}\t{word}\n" for wnid, word in words), encoding="utf-8")
    for name, label, data in zip(train["names"], train["labels"], train["files"], strict=True):
        (base / "train" / wnids[label] / "images" / name).write_bytes(data)
    for name, data in zip(val["names"], val["files"], strict=True):
        (base / "val" / "images" / name).write_bytes(data)
    rows = (f"{name}\t{wnids[label]}\t0\t0\t63\t63\n" for name, label in zip(val["names"], val["labels"], strict=True))
    (base / "val" / "val_annotations.txt").write_text("".join(rows))
    return base


def _jpegs(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as held:
        arrays: dict[str, Any] = dict(held)
    packed = arrays["jpeg"].tobytes()
    files = [packed[start:stop] for start, stop in itertools.pairwise(arrays["offsets"])]
    return {**arrays, "files": files, "names": arrays["filenames"].astype(str).tolist()}
