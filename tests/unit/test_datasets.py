"""Data sets: what is embedded stays what it is, and a user's files are read exactly or refused with a reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustkd.catalog import Shelf
from robustkd.datasets import fashion_mnist
from robustkd.datasets._base import ImageSet, balanced
from robustkd.datasets._open import open_dataset
from robustkd.datasets.npz import MAX_CLASSES, read_npz
from robustkd.errors import ArtifactError, ConfigError
from tests import real_data

DATA = Path(fashion_mnist.__file__).parent / "data"
#: digests of pixels and labels in order, ImageSet.sha256
EMBEDDED = {
    "train": "937af4e610c486d3b47e6fc27c14b71e19db87f501038138bf171ccb6f356790",
    "test": "653a7c62c4acc88dfb07a38473148a519697e5a049bfbaeadaebfe323e85b56c",
}


def config(name: str, **values: Any) -> Any:
    return Shelf("datasets").get(name)(name=name, **values)


def pictures(n: int = 6, *, channels: int = 3, size: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


# --- the contract of a split


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (np.zeros((2, 8, 8), np.uint8), [0, 1], "shape"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0], "2 images but 1 labels"),
        (np.zeros((0, 1, 8, 8), np.uint8), [], "no images"),
        (np.zeros((1, 1, 8, 8), np.float64), [0], "float64"),
        (np.zeros((1, 1, 8, 8), np.int32), [0], "int32"),
        (np.zeros((1, 1, 8, 8), np.uint8), [2], "2 classes"),
        (np.zeros((1, 1, 8, 8), np.uint8), [-1], "from -1"),
    ],
)
def test_a_split_that_cannot_be_is_refused(images: Any, labels: list[int], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        ImageSet(images, np.array(labels, np.int64), ("a", "b"), "mine", "test")


def test_a_split_counts_takes_and_scales() -> None:
    part = ImageSet(pictures(), np.array([0, 1, 0, 1, 0, 1]), ("a", "b"), "mine", "test")
    assert len(part) == 6 and part.shape == (3, 8, 8)
    taken = part.take(np.array([5, 0]))
    assert np.array_equal(taken.images, part.images[[5, 0]]) and taken.labels.tolist() == [1, 0]
    floats = part.floats()
    assert floats.dtype == np.float32 and np.array_equal((floats * 255).round().astype(np.uint8), part.images)
    assert floats.min() >= 0 and floats.max() <= 1


def test_the_digest_sees_pixels_labels_and_order() -> None:
    part = ImageSet(pictures(), np.array([0, 1, 0, 1, 0, 1]), ("a", "b"), "mine", "test")
    one_pixel = part.images.copy()
    one_pixel[3, 1, 2, 3] ^= 1
    others = [
        ImageSet(one_pixel, part.labels, part.classes, "mine", "test"),
        ImageSet(part.images, 1 - part.labels, part.classes, "mine", "test"),
        part.take(np.array([1, 0, 2, 3, 4, 5])),
    ]
    assert len({part.sha256, *(other.sha256 for other in others)}) == 4
    strided = ImageSet(part.images[:, :, ::1, ::-1][:, :, :, ::-1], part.labels, part.classes, "mine", "test")
    assert strided.sha256 == part.sha256, "the layout in memory is no content"


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6), n=st.integers(0, 80), seed=st.integers(0, 2**31))
def test_balanced_choice(counts: list[int], n: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    index = balanced(labels, n, seed)
    assert len(index) == min(n, len(labels)) and len(set(index.tolist())) == len(index)
    assert np.array_equal(index, balanced(labels, n, seed))
    chosen = np.bincount(labels[index], minlength=len(counts))
    for a, b in [(a, b) for a in range(len(counts)) for b in range(len(counts))]:
        if chosen[a] < counts[a]:  # a class is behind another only where it has no image left
            assert chosen[b] <= chosen[a] + 1


def test_balanced_choice_depends_on_the_seed_and_is_shuffled() -> None:
    labels = np.repeat(np.arange(10), 50)
    first = balanced(labels, 100, 0)
    assert not np.array_equal(first, balanced(labels, 100, 1))
    assert len(set(labels[first[:20]].tolist())) > 2, "the classes come mixed"


# --- the embedded set


@pytest.mark.parametrize(("split", "n"), [("train", 10_000), ("test", 2_000)])
def test_embedded_images_never_change(split: Any, n: int) -> None:
    part = config("fashion-mnist-10k").load(split)
    assert len(part) == n and part.shape == (1, 28, 28) and part.images.dtype == np.uint8
    assert np.bincount(part.labels).tolist() == [n // 10] * 10
    assert part.classes == fashion_mnist.CLASSES and part.name == "fashion-mnist-10k"
    assert part.sha256 == EMBEDDED[split]


def test_embedded_file_is_small_and_licensed() -> None:
    assert (DATA / "fashion_mnist_10k.npz.xz").stat().st_size <= 6_000_000
    text = (DATA / "LICENSE.fashion-mnist").read_text()
    assert "MIT" in text and "Zalando" in text


def test_embedded_splits_share_no_image() -> None:
    train, test = (config("fashion-mnist-10k").load(split) for split in ("train", "test"))
    shared = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert len(shared) <= 2, "the published splits have next to no duplicates"


# --- Fashion-MNIST from disk


def idx_folder(folder: Path, *, packed: bool) -> Path:
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, n in (("train", 5), ("t10k", 3)):
        files = {
            f"{stem}-images-idx3-ubyte": np.array([2051, n, 28, 28], ">i4").tobytes() + bytes(n * 784),
            f"{stem}-labels-idx1-ubyte": np.array([2049, n], ">i4").tobytes() + bytes(range(n)),
        }
        for name, data in files.items():
            (raw / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_that_are_not_the_published_ones_are_refused(tmp_path: Path, packed: bool) -> None:
    with pytest.raises(ArtifactError, match="is not the published file") as caught:
        config("fashion-mnist", root=idx_folder(tmp_path, packed=packed)).load("train")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_in_either_form(tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    idx_folder(tmp_path, packed=packed)
    md5 = {}
    for file in (tmp_path / "FashionMNIST" / "raw").iterdir():
        data = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
        md5[file.name.removesuffix(".gz")] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(fashion_mnist, "MD5", md5)
    part = config("fashion-mnist", root=tmp_path).load("test")
    assert part.images.shape == (3, 1, 28, 28) and part.labels.tolist() == [0, 1, 2] and not part.note


@pytest.mark.parametrize("damage", ["cut", "foreign", "changed", "missing"])
def test_packed_idx_files_that_are_damaged(tmp_path: Path, damage: str) -> None:
    idx_folder(tmp_path, packed=True)
    file = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    data = file.read_bytes()
    changed = data[:12] + bytes(b ^ 0xFF for b in data[12:]) if damage == "changed" else data[:-6]
    file.write_bytes(b"text" if damage == "foreign" else changed)
    if damage == "missing":
        file.unlink()
    images = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    with pytest.raises(ArtifactError, match="cannot read train-labels"):
        fashion_mnist._unpack(images.parent, "train-labels-idx1-ubyte")


def test_the_embedded_part_stands_in_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "absent")
    part = config("fashion-mnist", root=tmp_path).load("test")
    assert len(part) == 2_000 and "embedded 2000 test images" in part.note and str(tmp_path) in part.note


# --- .npz


def npz(folder: Path, name: str = "mine.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


Y = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        ("NCHW", pictures()),
        ("NHWC", pictures().transpose(0, 2, 3, 1)),
        ("NHW", pictures(channels=1)[:, 0]),
        ("NCHW grey", pictures(channels=1)),
        ("NHWC grey", pictures(channels=1).transpose(0, 2, 3, 1)),
    ],
)
def test_npz_layouts(tmp_path: Path, layout: str, stored: Any) -> None:
    images, labels, names = read_npz(npz(tmp_path, x=stored, y=Y))
    expected = pictures(channels=1 if "grey" in layout or layout == "NHW" else 3)
    assert images.dtype == np.uint8 and np.array_equal(images, expected) and images.flags["C_CONTIGUOUS"]
    assert labels.dtype == np.int64 and labels.tolist() == Y.tolist() and names == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_floats(tmp_path: Path, dtype: Any) -> None:
    stored = (pictures() / 255).astype(dtype)
    images, _, _ = read_npz(npz(tmp_path, x=stored, y=Y.astype(np.uint8)))
    assert images.dtype == np.float32 and np.array_equal(images, stored.astype(np.float32))


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (pictures() / 254, Y, r"not in \[0, 1\]"),
        (pictures() / -255.0, Y, r"not in \[0, 1\]"),
        (np.full((6, 3, 8, 8), np.nan), Y, r"not in \[0, 1\]"),
        (pictures().astype(np.int64), Y, "x is int64"),
        (pictures() > 9, Y, "x is bool"),
        (pictures(), np.eye(3)[Y], "y has shape"),
        (pictures(), Y.astype(float), "y has shape"),
        (pictures(), np.array(list("abcabc")), "y has shape"),
        (pictures(channels=4).transpose(0, 2, 3, 1), Y, "1 or 3 channels"),
        (pictures(channels=4), Y, "1 or 3 channels"),
        (pictures()[0, 0], Y, "shape"),
    ],
)
def test_npz_of_another_kind(tmp_path: Path, x: Any, y: Any, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason) as caught:
        config("npz", test=[npz(tmp_path, x=x, y=y)]).load("test")
    assert caught.value.exit_code == 5 and (caught.value.where or caught.value.fix)


@pytest.mark.parametrize("y", [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1, -1], [0] * 5 + [MAX_CLASSES], [0] * 5 + [2**63]])
def test_npz_labels_that_cannot_be(tmp_path: Path, y: list[int]) -> None:
    with pytest.raises(ArtifactError):
        config("npz", test=[npz(tmp_path, x=pictures(), y=np.array(y))]).load("test")


def test_npz_without_images(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no images"):
        config("npz", test=[npz(tmp_path, x=pictures(0), y=Y[:0])]).load("test")


class Dangerous:
    ran = False

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _mark_ran, ()


def _mark_ran() -> int:
    Dangerous.ran = True
    return 0


@pytest.mark.parametrize("which", ["x", "y", "classes"])
def test_nothing_is_unpickled(tmp_path: Path, which: str) -> None:
    arrays: dict[str, Any] = {"x": pictures(), "y": Y, "classes": np.array(["a", "b", "c"])}
    arrays[which] = np.array([Dangerous(), Dangerous()], dtype=object)
    with pytest.raises(ArtifactError, match="cannot read"):
        read_npz(npz(tmp_path, **arrays))
    assert not Dangerous.ran


def _packed(*, compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, x=pictures(2, channels=1, size=4), y=Y[:2])
    return buffer.getvalue()


PACKED = {compressed: _packed(compressed=compressed) for compressed in (True, False)}


@pytest.mark.parametrize("compressed", [True, False])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_a_damaged_npz_is_an_artifact_error_or_reads_the_same(tmp_path: Path, compressed: bool, data: st.DataObject) -> None:
    whole = PACKED[compressed]
    index, change = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole) - 1)))
    damaged = whole[:cut] if cut is not None else whole[:index] + bytes([whole[index] ^ change]) + whole[index + 1 :]
    (tmp_path / "mine.npz").write_bytes(damaged)
    try:
        images, labels, _ = read_npz(tmp_path / "mine.npz")
    except ArtifactError:
        return
    assert np.array_equal(images, pictures(2, channels=1, size=4)) and labels.tolist() == [0, 1]


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npz.npy", pictures())
    (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.npz").write_text("x y")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x.txt", "not an array")
    for name in ("array", "text", "empty", "folder", "other", "absent"):
        with pytest.raises(ArtifactError):
            read_npz(tmp_path / f"{name}.npz")


def test_npz_lacking_an_array_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds \['images', 'y'\]"):
        read_npz(npz(tmp_path, images=pictures(), y=Y))


def test_several_npz_files_make_one_split(tmp_path: Path) -> None:
    files = [npz(tmp_path, f"{i}.npz", x=pictures()[i * 2 : i * 2 + 2], y=Y[i * 2 : i * 2 + 2]) for i in range(3)]
    part = config("npz", train=files).load("train")
    assert np.array_equal(part.images, pictures()) and part.labels.tolist() == Y.tolist()
    assert part.classes == ("0", "1", "2")
    relative = config("npz", root=tmp_path, test=["1.npz"], classes=["a", "b", "c"]).load("test")
    assert relative.classes == ("a", "b", "c") and len(relative) == 2


@pytest.mark.parametrize("other", [{"size": 9}, {"channels": 1}])
def test_npz_files_that_differ_are_not_mixed(tmp_path: Path, other: dict[str, int]) -> None:
    files = [npz(tmp_path, "a.npz", x=pictures(), y=Y), npz(tmp_path, "b.npz", x=pictures(**other), y=Y)]
    with pytest.raises(ArtifactError, match="differ in shape or type"):
        config("npz", train=files).load("train")


def test_npz_class_names(tmp_path: Path) -> None:
    named = npz(tmp_path, "a.npz", x=pictures(), y=Y, classes=np.array(["cat", "dog", "cow"]))
    assert config("npz", test=[named]).load("test").classes == ("cat", "dog", "cow")
    other = npz(tmp_path, "b.npz", x=pictures(), y=Y, classes=np.array(["dog", "cat", "cow"]))
    with pytest.raises(ArtifactError, match="differ in their class names"):
        config("npz", test=[named, other]).load("test")
    with pytest.raises(ArtifactError, match="classes"):
        config("npz", test=[npz(tmp_path, "c.npz", x=pictures(), y=Y, classes=np.array("cat"))]).load("test")
    with pytest.raises(ArtifactError, match="there are 2 classes"):
        config("npz", test=[named], classes=["cat", "dog"]).load("test")


def test_npz_without_files_for_the_split(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no \.npz files for the train split"):
        config("npz", test=["a.npz"]).load("train")


# --- CIFAR-10


def cifar_folder(folder: Path, *, each: int = 3) -> Path:
    target = folder / "cifar-10-batches-bin"
    target.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        pixels = rng.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, (each, 1), dtype=np.uint8)
        (target / name).write_bytes(np.concatenate([labels, pixels], 1).tobytes())
    return target


def test_cifar10_records(tmp_path: Path) -> None:
    folder = cifar_folder(tmp_path)
    train, test = (config("cifar10", root=tmp_path).load(split) for split in ("train", "test"))
    assert len(train) == 15 and len(test) == 3 and train.shape == (3, 32, 32)
    record = (folder / "data_batch_4.bin").read_bytes()[3073 : 2 * 3073]
    assert train.labels[10] == record[0] and train.images[10].tobytes() == record[1:], "planes in order R, G, B"
    assert train.classes[0] == "airplane" and len(train.classes) == 10


@pytest.mark.parametrize(
    ("damage", "reason"), [("cut", "cut short"), ("empty", "cut short"), ("missing", "missing"), ("label", "labels")]
)
def test_cifar10_damaged(tmp_path: Path, damage: str, reason: str) -> None:
    file = cifar_folder(tmp_path) / "data_batch_3.bin"
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-1], "empty": b"", "label": b"\x0a" + data[1:]}.get(damage, data))
    if damage == "missing":
        file.unlink()
    with pytest.raises(ArtifactError, match=reason) as caught:
        config("cifar10", root=tmp_path).load("train")
    assert caught.value.exit_code == 5


def test_cifar10_python_layout_is_checked_before_it_is_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError, match="cifar-10-batches-py"):
        config("cifar10", root=tmp_path).load("test")


def test_cifar10_absent_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path))
    with pytest.raises(ArtifactError, match="CIFAR-10 is not here") as caught:
        config("cifar10").load("test")
    assert caught.value.where == str(tmp_path) and "ROBUSTKD_DATA" in caught.value.fix


@pytest.mark.slow
def test_real_cifar10_is_the_published_one(tmp_path: Path) -> None:
    folder = real_data.cifar10_binary(tmp_path)
    for name, digest in real_data.CIFAR10_SHA1.items():
        assert hashlib.sha1((folder / name).read_bytes()).hexdigest() == digest, name
    train = config("cifar10", root=tmp_path).load("train")
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert train.classes[train.labels[0]] == "frog", "the first training image is a frog"


@pytest.mark.slow
def test_real_cifar10_as_npz_is_the_same(tmp_path: Path) -> None:
    train, test = real_data.cifar10_npz(tmp_path, train_parts=1)
    binary = real_data.cifar10_binary(tmp_path, parts=1)
    part = config("npz", train=[train], test=[test]).load("train")
    records = np.fromfile(binary / "data_batch_1.bin", np.uint8).reshape(-1, 3073)
    assert np.array_equal(part.images.reshape(-1, 3072), records[:, 1:])
    assert np.array_equal(part.labels, records[:, 0])
    assert len(config("npz", test=[test]).load("test")) == 5_000


# --- from what a user types


def test_open_by_name_npz_or_folder(tmp_path: Path) -> None:
    file = npz(tmp_path, x=pictures(), y=Y)
    assert open_dataset("cifar10", tmp_path).root == tmp_path
    assert len(open_dataset(str(file)).load("test")) == 6
    assert open_dataset(str(tmp_path)).name == "folder"
    assert open_dataset({"name": "fashion-mnist-10k", "holdout": 3}).holdout == 3


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("cifar11", ConfigError),
        ("absent.npz", ArtifactError),
        ("some/where", ArtifactError),
        ({"name": "cifar10", "hold_out": 3}, ConfigError),
        ({"holdout": 3}, ConfigError),
    ],
)
def test_open_nothing_known(spec: Any, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        open_dataset(spec)
