"""CIFAR-100 and Tiny-ImageNet, read from small trees in the official layouts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustkd.catalog import Shelf
from robustkd.datasets import tiny_imagenet
from robustkd.errors import ArtifactError
from tests import real_data

NAMES = [f"thing_{i:03d}" for i in range(100)]


def config(name: str, **values: Any) -> Any:
    return Shelf("datasets").get(name)(name=name, **values)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("cifar10", (3, 32, 32), 10),
        ("cifar100", (3, 32, 32), 100),
        ("tiny-imagenet", (3, 64, 64), 200),
        ("fashion-mnist", (1, 28, 28), 10),
    ],
)
def test_what_is_known_before_a_file_is_read(name: str, shape: tuple[int, ...], classes: int) -> None:
    facts = config(name).facts
    assert (facts.shape, facts.classes) == (shape, classes)


def test_the_embedded_set_is_what_its_facts_say() -> None:
    part = config("fashion-mnist-10k").load("test")
    facts = config("fashion-mnist-10k").facts
    assert part.shape == facts.shape and len(part.classes) == facts.classes


def test_a_users_own_data_has_no_facts() -> None:
    assert config("npz").facts is None and config("folder").facts is None


# --- CIFAR-100


def cifar100(folder: Path) -> Path:
    target = folder / "cifar-100-binary"
    target.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train.bin", 5), ("test.bin", 3)):
        coarse, fine = rng.integers(0, 20, (n, 1)), rng.integers(20, 100, (n, 1))
        pixels = rng.integers(0, 256, (n, 3072))
        (target / name).write_bytes(np.concatenate([coarse, fine, pixels], 1).astype(np.uint8).tobytes())
    (target / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n\n")
    (target / "coarse_label_names.txt").write_text("\n".join(f"kind{i}" for i in range(20)) + "\n")
    return target


def test_cifar100_takes_the_fine_label_and_the_planes_of_each_record(tmp_path: Path) -> None:
    folder = cifar100(tmp_path)
    for split, n in (("train", 5), ("test", 3)):
        part = config("cifar100", root=tmp_path).load(split)
        assert len(part) == n and part.shape == (3, 32, 32) and part.images.dtype == np.uint8
        raw = (folder / f"{split}.bin").read_bytes()
        record = raw[2 * 3074 : 3 * 3074]
        assert part.labels[2] == record[1] and part.labels.dtype == np.int64
        assert part.images[2].tobytes() == record[2:], "planes in order R, G, B"
        assert part.classes == tuple(NAMES)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("train.bin", b"\x00" * 3073, "cut short"),
        ("train.bin", b"", "cut short"),
        ("train.bin", b"\x00" + b"\x64" + b"\x00" * 3072, "labels run from 100"),
        ("train.bin", None, "train.bin is missing"),
        ("fine_label_names.txt", b"apple\n", "holds 1 names, not 100"),
        ("fine_label_names.txt", b"\xff\xfe", "cannot read fine_label_names"),
        ("fine_label_names.txt", None, "cannot read fine_label_names"),
    ],
)
def test_cifar100_damaged(tmp_path: Path, file: str, content: bytes | None, reason: str) -> None:
    target = cifar100(tmp_path) / file
    target.unlink()
    if content is not None:
        target.write_bytes(content)
    with pytest.raises(ArtifactError, match=reason) as caught:
        config("cifar100", root=tmp_path).load("train")
    assert caught.value.exit_code == 5 and (caught.value.where or caught.value.fix)


def test_cifar100_python_layout_is_checked_before_it_is_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError, match="cifar-100-python"):
        config("cifar100", root=tmp_path).load("test")


def test_cifar100_python_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are our own, so torchvision's digests are set aside; what is tested is what becomes of its arrays."""
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    held = {"data": pixels, "fine_labels": [3, 99, 0, 7], "coarse_labels": [0, 1, 2, 3]}
    (folder / "test").write_bytes(pickle.dumps(held))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}))
    part = config("cifar100", root=tmp_path).load("test")
    assert part.labels.tolist() == [3, 99, 0, 7] and part.classes == tuple(NAMES)
    assert np.array_equal(part.images.reshape(4, -1), pixels)


@pytest.mark.parametrize("name", ["cifar100", "tiny-imagenet"])
def test_absent_data_says_where_to_put_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path))
    with pytest.raises(ArtifactError, match="is not here") as caught:
        config(name).load("test")
    assert caught.value.where == str(tmp_path) and "ROBUSTKD_DATA" in caught.value.fix


@pytest.mark.slow
def test_real_cifar100(tmp_path: Path) -> None:
    real_data.cifar100_binary(tmp_path)
    train, test = (config("cifar100", root=tmp_path).load(split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [100] * 100 and np.bincount(test.labels).tolist() == [50] * 100
    assert train.classes[0] == "apple" and train.classes == tuple(sorted(train.classes)) and train.classes[99] == "worm"
    source = real_data.need_data(*real_data.CIFAR100_FILES.values())
    images, _ = real_data.read_grids(source / real_data.CIFAR100_FILES["train.bin"])
    assert np.array_equal(train.images, images.transpose(0, 3, 1, 2))


# --- Tiny-ImageNet

WNIDS = [f"n{i:08d}" for i in range(200)]


def shade(label: int) -> int:
    """The grey value a picture of a class has: far enough apart for JPEG to keep it."""
    return 40 + label


def picture(file: Path, label: int, *, mode: str = "RGB", size: int = 64) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    value = shade(label)
    Image.new(mode, (size, size), value if mode == "L" else (value, value, value)).save(file, quality=95)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official tree with one training and one validation picture a class."""
    root = tmp_path_factory.mktemp("tiny")
    base = root / "tiny-imagenet-200"
    rows = []
    for label, wnid in enumerate(WNIDS):
        picture(base / "train" / wnid / "images" / f"{wnid}_0.JPEG", label, mode="L" if label == 5 else "RGB")
        name = f"val_{199 - label}.JPEG"
        picture(base / "val" / "images" / name, label)
        rows.append((199 - label, f"{name}\t{wnid}\t0\t0\t63\t63\n"))
    (base / "val" / "val_annotations.txt").write_text("".join(row for _, row in sorted(rows)))
    (base / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    words = "".join(f"{wnid}\tword{i}, other name\n" for i, wnid in enumerate(WNIDS) if i != 7)
    (base / "words.txt").write_text("n99999999\tentity\n" + words)
    return root


def shades(part: Any) -> list[int]:
    return [round(float(image.mean())) for image in part.images]


def test_tiny_imagenet_labels_are_positions_in_the_sorted_ids(tree: Path) -> None:
    part = config("tiny-imagenet", root=tree).load("train")
    assert len(part) == 200 and part.shape == (3, 64, 64) and part.images.dtype == np.uint8
    assert part.labels.tolist() == list(range(200))
    assert shades(part) == [shade(label) for label in range(200)], "the grey picture of class 5 included"
    assert part.classes[0] == "word0" and part.classes[7] == WNIDS[7], "an id without words names itself"


def test_tiny_imagenet_tests_on_the_official_val(tree: Path) -> None:
    part = config("tiny-imagenet", root=tree).load("test")
    assert part.labels.tolist() == list(range(199, -1, -1)), "in the order of the annotations"
    assert shades(part) == [shade(label) for label in part.labels]


def test_tiny_imagenet_root_may_be_the_tree_itself(tree: Path) -> None:
    whole = config("tiny-imagenet", root=tree).load("test")
    assert config("tiny-imagenet", root=tree / "tiny-imagenet-200").load("test").sha256 == whole.sha256


@pytest.mark.parametrize("inner", ["", "images"])
def test_tiny_imagenet_val_with_one_folder_per_class(tmp_path: Path, inner: str) -> None:
    (tmp_path / "wnids.txt").write_text("\n".join(WNIDS))
    for label, wnid in enumerate(WNIDS):
        picture(tmp_path / "val" / wnid / inner / f"{label}.png", label)
    part = config("tiny-imagenet", root=tmp_path).load("test")
    assert part.labels.tolist() == list(range(200)) and shades(part) == [shade(label) for label in range(200)]
    assert part.classes == tuple(WNIDS)


def _damaged(tree: Path, root: Path, file: str, content: str | None) -> Path:
    """The tree with one of its text files, or a picture, replaced or left out; the rest is linked."""
    base = root / "tiny-imagenet-200"
    base.mkdir()
    for part in ("train", "val", "wnids.txt", "words.txt"):
        if not file.startswith(part):
            (base / part).symlink_to(tree / "tiny-imagenet-200" / part)
    if file.startswith("val"):
        (base / "val").mkdir()
        (base / "val" / "images").symlink_to(tree / "tiny-imagenet-200" / "val" / "images")
    if content is not None:
        (base / file).write_text(content)
    return root


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("wnids.txt", "n00000001\n", "names 1 classes, not 200"),
        ("val/val_annotations.txt", "val_0.JPEG\tn77777777\t0\n", "n77777777 is not in wnids.txt"),
        ("val/val_annotations.txt", "val_0.JPEG\n", "no id is not in wnids.txt"),
        ("val/val_annotations.txt", "val_900.JPEG\tn00000001\t0\n", "val_900.JPEG cannot be read"),
        ("val/val_annotations.txt", None, "no pictures of this class"),
    ],
)
def test_tiny_imagenet_damaged(tree: Path, tmp_path: Path, file: str, content: str | None, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason) as caught:
        config("tiny-imagenet", root=_damaged(tree, tmp_path, file, content)).load("test")
    assert caught.value.exit_code == 5 and caught.value.where and caught.value.fix


def test_tiny_imagenet_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wnids.txt").write_text("\n".join(WNIDS))
    for label, wnid in enumerate(WNIDS):
        picture(tmp_path / "train" / wnid / "images" / "a.JPEG", label, size=8)
    with pytest.raises(ArtifactError, match="8x8 pixels, not 64x64"):
        config("tiny-imagenet", root=tmp_path).load("train")


@pytest.mark.slow
def test_real_tiny_imagenet(tmp_path: Path) -> None:
    real_data.tiny_imagenet(tmp_path)
    train, test = (config("tiny-imagenet", root=tmp_path).load(split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [15] * 200 and len(test) == 5_000
    assert train.classes[0] == "goldfish" and train.shape == (3, 64, 64) == tiny_imagenet.ENTRY.facts.shape
    assert test.labels[:4].tolist() == [107, 139, 140, 69], "as the published annotations have it"
    grey = (test.images[:, 0] == test.images[:, 1]).all((1, 2)) & (test.images[:, 1] == test.images[:, 2]).all((1, 2))
    assert 0 < grey.sum() < 250, "a few pictures are grey"
