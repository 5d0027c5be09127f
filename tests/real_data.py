"""The optional folder of real images, turned into what a user has: each data set's official files, picture trees, .npz.

The folder is ROBUSTKD_TEST_DATA, or `../shared/data` relative to the repository root. CIFAR-10, CIFAR-100 and GTSRB lie
there as lossless WebP pictures that tile grids of images, Tiny-ImageNet and Imagenette as the original JPEG files back to
back, MNIST as arrays. Decoded, the training parts of CIFAR-10 are byte for byte the official binary files.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
PART = 10_000

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
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


def read_grids(file: Path, n: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, H, W, C) uint8 and labels (N,) of one file of tiled WebP pictures; the first `n`, or all."""
    from PIL import Image

    with np.load(file, allow_pickle=False) as held:
        arrays: dict[str, Any] = dict(held)
    tile, columns, each = int(arrays["tile"]), int(arrays["cols"]), int(arrays["per_stream"])
    offsets, labels = arrays["offsets"], arrays["labels"].astype(np.int64)
    labels = labels[:n]
    images = []
    for index, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if index * each >= len(labels):
            break
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


def cifar10_binary(folder: Path, *, parts: int = 5, n: int | None = None) -> Path:
    """Write `cifar-10-batches-bin` into `folder`: official training files, and the 5,000 test images there are.

    Args:
        folder: where it goes.
        parts: how many of the five training files.
        n: only so many images of each file; left out, all.
    """
    names = {f"data_batch_{part}.bin": _train_file(part) for part in range(1, parts + 1)}
    source = need_data(*names.values(), TEST_FILE)
    target = folder / "cifar-10-batches-bin"
    target.mkdir(parents=True, exist_ok=True)
    for name, file in (names | {"test_batch.bin": TEST_FILE}).items():
        images, labels = read_grids(source / file, n)
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        records = np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)
        (target / name).write_bytes(records.tobytes())
    return target


def cifar10_python(folder: Path, *, n: int | None = None) -> Path:
    """Write `cifar-10-batches-py` into `folder`: the same images, pickled as the official Python version is."""
    names = {f"data_batch_{part}": _train_file(part) for part in range(1, 6)}
    source = need_data(*names.values(), TEST_FILE)
    target = folder / "cifar-10-batches-py"
    target.mkdir(parents=True, exist_ok=True)
    for name, file in (names | {"test_batch": TEST_FILE}).items():
        images, labels = read_grids(source / file, n)
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        (target / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}))
    (target / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    return target


CIFAR100_FILES = {"train.bin": "cifar100/cifar100_train_1.npz", "test.bin": "cifar100/cifar100_test_0000_4999.npz"}


def cifar100_binary(folder: Path, *, n: int | None = None) -> Path:
    """Write `cifar-100-binary` into `folder`: real images with both labels, a part of each official split, or `n` of it."""
    source = need_data(*CIFAR100_FILES.values())
    target = folder / "cifar-100-binary"
    target.mkdir(parents=True, exist_ok=True)
    for name, file in CIFAR100_FILES.items():
        images, fine = read_grids(source / file, n)
        with np.load(source / file, allow_pickle=False) as held:
            coarse, names = held["fine_to_coarse"][fine], held["class_names"].astype(str)
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        records = np.concatenate([coarse[:, None], fine.astype(np.uint8)[:, None], pixels], axis=1)
        (target / name).write_bytes(records.astype(np.uint8).tobytes())
    (target / "fine_label_names.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    return target


TINY_FILES = ("tiny_imagenet/tiny_imagenet_train_3000.npz", "tiny_imagenet/tiny_imagenet_val_0000_4999.npz")


def tiny_imagenet(folder: Path, *, each: int | None = None) -> Path:
    """Write the official tree `tiny-imagenet-200` into `folder`: original JPEG files, 3,000 of train, 5,000 of val.

    Args:
        folder: where it goes.
        each: only so many images of a class in either part; left out, all.
    """
    source = need_data(*TINY_FILES)
    base = folder / "tiny-imagenet-200"
    train, val = (_jpegs(source / file, each) for file in TINY_FILES)
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


def _jpegs(file: Path, each: int | None = None) -> dict[str, Any]:
    """The arrays of the file, with `files` (bytes), `names` and `labels` of the first `each` of every class."""
    with np.load(file, allow_pickle=False) as held:
        arrays: dict[str, Any] = dict(held)
    packed = arrays["jpeg"].tobytes()
    files = [packed[start:stop] for start, stop in itertools.pairwise(arrays["offsets"])]
    names, labels = arrays["filenames"].astype(str).tolist(), arrays["labels"].tolist()
    kept = [i for i, label in enumerate(labels) if each is None or labels[:i].count(label) < each]
    return {
        **arrays,
        **{key: [all_[i] for i in kept] for key, all_ in (("files", files), ("names", names), ("labels", labels))},
    }


GTSRB_FILES = ("gtsrb/gtsrb32_train_5160.npz", "gtsrb/gtsrb32_test_0000_1999.npz")


def gtsrb(folder: Path, *, n: int | None = None) -> Path:
    """Write torchvision's tree `gtsrb` into `folder`: 120 training pictures a class and 2,000 test pictures, 32x32, as PPM.

    Args:
        folder: where it goes.
        n: only the first so many of each; too few leave a class without a picture.
    """
    from PIL import Image

    source = need_data(*GTSRB_FILES)
    base = folder / "gtsrb"
    (images, labels), (test, answers) = (read_grids(source / file, n) for file in GTSRB_FILES)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = base / "GTSRB" / "Training" / f"{label:05d}" / f"{index:05d}_00000.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    (base / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    for index, (image, label) in enumerate(zip(test, answers, strict=True)):
        Image.fromarray(image).save(base / "GTSRB" / "Final_Test" / "Images" / f"{index:05d}.ppm")
        rows.append(f"{index:05d}.ppm;32;32;0;0;31;31;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return base


IMAGENETTE_FILES = {
    "train": "imagenette/imagenette224_train_300.npz",
    "val": "imagenette/imagenette224_val_400.npz",
}


def imagenette(folder: Path, *, name: str = "imagenette2-320", each: int | None = None) -> Path:
    """Write the official tree into `folder`: original JPEG files of 224x224, 300 of train and 400 of val.

    Args:
        folder: where it goes.
        name: of the official tree: which of the three sizes it stands for.
        each: only so many images of a class in either part; left out, all.
    """
    source = need_data(*IMAGENETTE_FILES.values())
    for part, packed in IMAGENETTE_FILES.items():
        held = _jpegs(source / packed, each)
        for file, label, data in zip(held["names"], held["labels"], held["files"], strict=True):
            target = folder / name / part / held["wnids"][label].decode() / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    return folder / name


def image_folder(folder: Path, *, n: int = 200) -> Path:
    """Write `train` and `test` with one folder of PNG files per class into `folder`: `n` images of CIFAR-10 each."""
    from PIL import Image

    source = need_data(_train_file(1), TEST_FILE)
    for split, file in (("train", _train_file(1)), ("test", TEST_FILE)):
        images, labels = read_grids(source / file, n)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            target = folder / split / CIFAR10_CLASSES[label] / f"{index:05d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target)
    return folder


def mnist_npz(folder: Path, *, n: int = 1000) -> tuple[Path, Path]:
    """Write two .npz of grey 28x28 images (x (N, 28, 28), y) into `folder`, `n` real digits each; skips without the data."""
    source = need_data("mnist/mnist_test.npz")
    with np.load(source / "mnist" / "mnist_test.npz", allow_pickle=False) as held:
        images, labels = held["images"][: 2 * n], held["labels"][: 2 * n]
    written = []
    for name, part in (("train-0.npz", slice(0, n)), ("train-1.npz", slice(n, 2 * n))):
        np.savez(folder / name, x=images[part], y=labels[part])
        written.append(folder / name)
    return written[0], written[1]
