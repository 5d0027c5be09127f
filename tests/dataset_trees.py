"""What a user has on disk of each data set: small synthetic files in every official layout, and real ones where there are.

In the synthetic ones a picture is of one grey value, `shade` of its label, so that a label that has slipped is seen.
"""

from __future__ import annotations

import gzip
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from robustkd.datasets import fashion_mnist, gtsrb, imagenette
from tests import real_data

Patch = Callable[[pytest.MonkeyPatch], None]


def shade(label: int) -> int:
    """The grey value of a class: JPEG keeps a flat one exactly."""
    return 30 + label


def nothing(patch: pytest.MonkeyPatch) -> None:
    """For files that are as published."""


@dataclass(frozen=True)
class Tree:
    """A data set on disk and what reading it must give.

    Attributes:
        name: on the shelf.
        values: of its config.
        shape: C, H, W of every image.
        counts: images of train and test.
        classes: how many.
        first: the name of class 0.
        patch: sets digests of published files aside, where the files are our own.
        shaded: whether `shade` tells the label from the pixels.
        exact: the pixels of a split (N, C, H, W), where they are known otherwise.
    """

    name: str
    values: dict[str, Any]
    shape: tuple[int, int, int]
    counts: tuple[int, int]
    classes: int
    first: str
    patch: Patch = nothing
    shaded: bool = False
    exact: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


def flat(label: int, size: int = 32, mode: str = "RGB") -> Any:
    """A picture of one grey value."""
    from PIL import Image

    value = shade(label)
    return Image.new(mode, (size, size), value if mode == "L" else (value, value, value))


def save(picture: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, quality=95)


def records(labels: list[int]) -> NDArray[np.uint8]:
    """Planes (N, 3072) of flat pictures."""
    return np.repeat(np.asarray([[shade(label)] for label in labels], np.uint8), 3072, 1)


# --- synthetic


def cifar10_binary(root: Path) -> Tree:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        labels = [*range(10)] * 2
        (folder / name).write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], records(labels)], 1).tobytes())
    return Tree("cifar10", {"root": root}, (3, 32, 32), (100, 20), 10, "airplane", shaded=True)


def _any_digest(patch: pytest.MonkeyPatch) -> None:
    for reader in ("cifar", "svhn"):
        patch.setattr(f"torchvision.datasets.{reader}.check_integrity", lambda path, md5=None: True)


def cifar10_python(root: Path) -> Tree:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = [*range(10)] * 2
        (folder / name).write_bytes(pickle.dumps({"data": records(labels), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(real_data.CIFAR10_CLASSES)}))
    return Tree("cifar10", {"root": root}, (3, 32, 32), (100, 20), 10, "airplane", _any_digest, shaded=True)


FINE = [f"thing_{i:03d}" for i in range(100)]


def cifar100_binary(root: Path) -> Tree:
    folder = root / "cifar-100-binary"
    folder.mkdir()
    for name, times in (("train.bin", 2), ("test.bin", 1)):
        labels = [*range(100)] * times
        coarse_fine = np.array([[label % 20, label] for label in labels], np.uint8)
        (folder / name).write_bytes(np.concatenate([coarse_fine, records(labels)], 1).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n\n")
    return Tree("cifar100", {"root": root}, (3, 32, 32), (200, 100), 100, FINE[0], shaded=True)


def cifar100_python(root: Path) -> Tree:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, times in (("train", 2), ("test", 1)):
        labels = [*range(100)] * times
        (folder / name).write_bytes(pickle.dumps({"data": records(labels), "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE}))
    return Tree("cifar100", {"root": root}, (3, 32, 32), (200, 100), 100, FINE[0], _any_digest, shaded=True)


def tiny_imagenet(root: Path) -> Tree:
    base, wnids = root / "tiny-imagenet-200", [f"n{i:08d}" for i in range(200)]
    rows = []
    for label, wnid in enumerate(wnids):
        save(flat(label, 64, "L" if label == 5 else "RGB"), base / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        save(flat(label, 64), base / "val" / "images" / f"val_{label}.JPEG")
        rows.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(rows))
    (base / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    (base / "words.txt").write_text("".join(f"{wnid}\tword{i}, other\n" for i, wnid in enumerate(wnids)))
    return Tree("tiny-imagenet", {"root": root}, (3, 64, 64), (200, 200), 200, "word0", shaded=True)


def svhn(root: Path) -> Tree:
    from scipy.io import savemat

    for name, times in (("train", 3), ("test", 2)):
        labels = [*range(10)] * times
        pixels = np.stack([np.full((32, 32, 3), shade(label), np.uint8) for label in labels], axis=3)
        called = np.array([[label or 10] for label in labels], np.uint8)  # the files call the digit 0 class 10
        savemat(root / f"{name}_32x32.mat", {"X": pixels, "y": called})
    return Tree("svhn", {"root": root}, (3, 32, 32), (30, 20), 10, "0", _any_digest, shaded=True)


def traffic_signs(root: Path) -> Tree:
    """Pictures of many sizes, as the originals are."""
    base, rows = root / "gtsrb", ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label in range(len(gtsrb.CLASSES)):
        for track in range(2):
            save(flat(label, 20 + label), base / "GTSRB" / "Training" / f"{label:05d}" / f"{track:05d}_00000.ppm")
        name = f"{42 - label:05d}.ppm"
        save(flat(label, 60 - label), base / "GTSRB" / "Final_Test" / "Images" / name)
        rows.append(f"{name};32;32;0;0;31;31;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    values = {"root": root, "size": 28}
    return Tree("gtsrb", values, (3, 28, 28), (86, 43), 43, "speed limit 20 km/h", shaded=True)


def imagenette_tree(root: Path) -> Tree:
    """Of its three sizes the one that has the pixels asked for."""
    for label, wnid in enumerate(imagenette.WORDNET):
        for split, n in (("train", 3), ("val", 2)):
            for i in range(n):
                save(flat(label, 200 + i), root / "imagenette2-160" / split / wnid / f"{wnid}_{i}.JPEG")
    return Tree("imagenette", {"root": root, "size": 96}, (3, 96, 96), (30, 20), 10, "tench", shaded=True)


def fashion(root: Path) -> Tree:
    raw, md5 = root / "FashionMNIST" / "raw", {}
    raw.mkdir(parents=True)
    for stem, times in (("train", 3), ("t10k", 2)):
        labels = np.arange(10 * times, dtype=np.uint8) % 10
        pixels = np.repeat((labels + shade(0))[:, None], 784, 1)
        head = np.array([2051, len(labels), 28, 28], ">i4").tobytes(), np.array([2049, len(labels)], ">i4").tobytes()
        for name, data in (
            (f"{stem}-images-idx3-ubyte", head[0] + pixels.tobytes()),
            (f"{stem}-labels-idx1-ubyte", head[1] + labels.tobytes()),
        ):
            (raw / f"{name}.gz").write_bytes(gzip.compress(data))
            md5[name] = hashlib.md5(data).hexdigest()

    def ours(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(fashion_mnist, "MD5", md5)

    return Tree("fashion-mnist", {"root": root}, (1, 28, 28), (30, 20), 10, "t-shirt/top", ours, shaded=True)


def folder(root: Path) -> Tree:
    """Not square, in several formats."""
    for label, name in enumerate(("ape", "bee", "cow")):
        for split, n in (("train", 4), ("val", 2)):
            for i in range(n):
                picture = flat(label, 40).resize((40, 30))
                save(picture, root / "mine" / split / name / f"{i}.{('png', 'jpg', 'bmp', 'ppm')[i]}")
    return Tree("folder", {"path": root / "mine"}, (3, 30, 40), (12, 6), 3, "ape", shaded=True)


def npz(root: Path) -> Tree:
    """Two files by a pattern and one by its name, grey and not square."""
    for name, n in (("train-0.npz", 6), ("train-1.npz", 9), ("test.npz", 6)):
        labels = np.arange(n) % 3
        pixels = np.stack([np.full((30, 44), shade(label), np.uint8) for label in labels])
        np.savez(root / name, x=pixels, y=labels, classes=np.array(["ape", "bee", "cow"]))
    values = {"root": root, "train": "train-*.npz", "test": ["test.npz"]}
    return Tree("npz", values, (1, 30, 44), (15, 6), 3, "ape", shaded=True)


# --- real


def real_fashion(root: Path) -> Tree:
    if fashion_mnist.full_folder(root) is None:
        pytest.skip(f"no full Fashion-MNIST: Debian's dataset-fashion-mnist is not under {fashion_mnist.SYSTEM}")
    return Tree("fashion-mnist", {"root": root}, (1, 28, 28), (60_000, 10_000), 10, "t-shirt/top")


def embedded(root: Path) -> Tree:
    return Tree("fashion-mnist-10k", {"root": root}, (1, 28, 28), (10_000, 2_000), 10, "t-shirt/top")


def _grids(train: list[str], test: str, n: int) -> dict[str, NDArray[np.uint8]]:
    """The pixels that must come out, decoded from the grids without any file between."""
    source = real_data.need_data(*train, test)
    found = {"train": [real_data.read_grids(source / file, n)[0] for file in train]}
    found["test"] = [real_data.read_grids(source / test, n)[0]]
    return {split: np.concatenate(parts).transpose(0, 3, 1, 2) for split, parts in found.items()}


_CIFAR10 = [f"cifar10/cifar10_train_{part}.npz" for part in range(1, 6)]


def real_cifar10_binary(root: Path) -> Tree:
    real_data.cifar10_binary(root, n=200)
    exact = _grids(_CIFAR10, real_data.TEST_FILE, 200)
    return Tree("cifar10", {"root": root}, (3, 32, 32), (1000, 200), 10, "airplane", exact=exact)


def real_cifar10_python(root: Path) -> Tree:
    real_data.cifar10_python(root, n=200)
    exact = _grids(_CIFAR10, real_data.TEST_FILE, 200)
    return Tree("cifar10", {"root": root}, (3, 32, 32), (1000, 200), 10, "airplane", _any_digest, exact=exact)


def real_cifar100(root: Path) -> Tree:
    real_data.cifar100_binary(root, n=1000)
    files = [*real_data.CIFAR100_FILES.values()]
    return Tree("cifar100", {"root": root}, (3, 32, 32), (1000, 1000), 100, "apple", exact=_grids(files[:1], files[1], 1000))


def real_tiny_imagenet(root: Path) -> Tree:
    real_data.tiny_imagenet(root, each=2)
    return Tree("tiny-imagenet", {"root": root}, (3, 64, 64), (400, 400), 200, "goldfish")


def real_gtsrb(root: Path) -> Tree:
    real_data.gtsrb(root, n=1000)
    exact = _grids([real_data.GTSRB_FILES[0]], real_data.GTSRB_FILES[1], 1000)
    del exact["train"]  # there the files are in the order of the classes
    return Tree("gtsrb", {"root": root}, (3, 32, 32), (1000, 1000), 43, "speed limit 20 km/h", exact=exact)


def real_imagenette(root: Path) -> Tree:
    real_data.imagenette(root, each=8)
    return Tree("imagenette", {"root": root, "size": 96}, (3, 96, 96), (80, 80), 10, "tench")


def real_folder(root: Path) -> Tree:
    real_data.image_folder(root, n=200)
    return Tree("folder", {"path": root}, (3, 32, 32), (200, 200), 10, "airplane")


def real_npz(root: Path) -> Tree:
    real_data.mnist_npz(root, n=1000)
    values = {"root": root, "train": ["train-*.npz"], "test": "train-1.npz"}
    with np.load(real_data.need_data("mnist/mnist_test.npz") / "mnist" / "mnist_test.npz") as held:
        exact = {"train": held["images"][:2000, None]}
    return Tree("npz", values, (1, 28, 28), (2000, 1000), 10, "0", exact=exact)


SYNTHETIC: dict[str, Callable[[Path], Tree]] = {
    "cifar10": cifar10_binary,
    "cifar10-python": cifar10_python,
    "cifar100": cifar100_binary,
    "cifar100-python": cifar100_python,
    "tiny-imagenet": tiny_imagenet,
    "svhn": svhn,
    "gtsrb": traffic_signs,
    "imagenette": imagenette_tree,
    "fashion-mnist": fashion,
    "fashion-mnist-10k": embedded,
    "folder": folder,
    "npz": npz,
}
REAL: dict[str, Callable[[Path], Tree]] = {
    "cifar10-real": real_cifar10_binary,
    "cifar10-python-real": real_cifar10_python,
    "cifar100-real": real_cifar100,
    "tiny-imagenet-real": real_tiny_imagenet,
    "gtsrb-real": real_gtsrb,
    "imagenette-real": real_imagenette,
    "fashion-mnist-real": real_fashion,
    "folder-real": real_folder,
    "npz-real": real_npz,
}
