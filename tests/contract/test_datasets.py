"""Every entry of the data set shelf, in each official layout, on synthetic files and on real ones: one contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from robustkd.catalog import Shelf
from robustkd.datasets import fashion_mnist
from robustkd.datasets._base import DatasetConfig, ImageSet
from robustkd.datasets._open import open_dataset
from robustkd.errors import ArtifactError
from robustkd.recipe.schema import Recipe
from robustkd.training.batches import divide
from tests.dataset_trees import REAL, SYNTHETIC, Tree, shade

pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("torchvision", reason="needs torchvision")
SPLITS: tuple[Any, Any] = ("train", "test")
NEEDS_FILES = sorted({"cifar10", "cifar100", "tiny-imagenet", "svhn", "gtsrb", "imagenette", "folder", "npz"})


@pytest.fixture(scope="module", params=[*SYNTHETIC, *REAL])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    made: Tree = (SYNTHETIC | REAL)[request.param](tmp_path_factory.mktemp(request.param))
    return made


@pytest.fixture(autouse=True)
def _own_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "tree" in request.fixturenames:
        request.getfixturevalue("tree").patch(monkeypatch)
    yield


def config(tree: Tree, **values: Any) -> DatasetConfig:
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in tree.values.items()}
    return open_dataset({"name": tree.name, **asked, **values})


@pytest.fixture(scope="module")
def parts(tree: Tree) -> dict[str, ImageSet]:
    """Both splits, in memory."""
    with pytest.MonkeyPatch.context() as patch:
        tree.patch(patch)
        return {split: config(tree, stream="never").load(split) for split in SPLITS}


def test_every_entry_of_the_shelf_is_tested() -> None:
    assert {name.removesuffix("-python") for name in SYNTHETIC} == set(Shelf("datasets").names())


def test_shape_type_and_range(tree: Tree, parts: dict[str, ImageSet]) -> None:
    facts = config(tree).facts
    for part, n in zip(parts.values(), tree.counts, strict=True):
        assert isinstance(part.images, np.ndarray) and part.images.dtype == np.uint8 and part.images.flags["C_CONTIGUOUS"]
        assert part.images.shape == (n, *tree.shape) and len(part) == n and part.shape == tree.shape
        if facts is not None:
            assert (facts.shape, facts.classes) == (part.shape, len(part.classes)), "what is said before a file is read"
        floats = part.take(np.arange(min(n, 100))).floats()
        assert floats.dtype == np.float32 and floats.min() >= 0 and 0.1 < floats.max() <= 1
        assert np.array_equal(np.rint(floats * 255).astype(np.uint8), part.images[:100])
        assert not part.note, "the files that were asked for were found"


def test_labels_and_class_names(tree: Tree, parts: dict[str, ImageSet]) -> None:
    train, test = parts["train"], parts["test"]
    assert train.classes == test.classes and len(train.classes) == tree.classes and train.classes[0] == tree.first
    assert len(set(train.classes)) == tree.classes and all(name.strip() == name and name for name in train.classes)
    for part in (train, test):
        assert part.labels.dtype == np.int64 and part.labels.min() >= 0 and part.labels.max() < tree.classes
        assert part.name == tree.name
    assert set(train.labels.tolist()) == set(range(tree.classes)), "each class has training images"
    assert (train.split, test.split) == SPLITS


def test_a_label_is_that_of_its_picture(tree: Tree, parts: dict[str, ImageSet]) -> None:
    for split, part in parts.items():
        if tree.shaded:
            images = np.asarray(part.images)
            assert np.array_equal(images[:, 0, 5, 5], [shade(int(label)) for label in part.labels])
            assert (images.reshape(len(images), -1) == images[:, :1, 0, 0]).all()
        if split in tree.exact:
            assert np.array_equal(part.images, tree.exact[split])


def test_reading_again_gives_the_same(tree: Tree, parts: dict[str, ImageSet]) -> None:
    assert config(tree).load("test").sha256 == parts["test"].sha256


def test_streaming_changes_no_pixel_and_no_label(tree: Tree, parts: dict[str, ImageSet]) -> None:
    streamed = config(tree, stream="always").load("test")
    assert streamed.sha256 == parts["test"].sha256 and streamed.shape == parts["test"].shape


def rows(part: ImageSet) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(np.asarray(part.images), part.labels, strict=True))


def test_train_and_held_out_images_are_a_partition_by_seed(tree: Tree, parts: dict[str, ImageSet]) -> None:
    """All images once: numbered, so that two equal pictures of a data set are still two."""
    whole = parts["train"]
    numbers = np.arange(len(whole), dtype=np.uint32).view(np.uint8).reshape(-1, 1, 2, 2)
    marked = ImageSet(numbers, whole.labels, whole.classes, whole.name, "train")
    chosen: dict[int, NDArray[np.int64]] = {}
    for seed in (0, 1):
        recipe = Recipe.model_validate(
            {
                "dataset": config(tree, holdout=10).model_dump(),
                "student": {"name": "resnet18"},
                "method": {"name": "pgd-at"},
                "seed": seed,
            }
        )
        train, held = divide(marked, recipe)
        again = divide(marked, recipe)[1]
        assert len(held) == min(10, len(whole) // 2) and len(train) == len(whole) - len(held)
        assert sorted(rows(train) + rows(held)) == rows(marked), "none twice, none lost"
        assert not {image for image, _ in rows(train)} & {image for image, _ in rows(held)}
        assert held.sha256 == again.sha256
        chosen[seed] = np.sort(held.images.reshape(-1, 4).copy().view(np.uint32)[:, 0])
    assert not np.array_equal(chosen[0], chosen[1]), "another seed holds out others"


@pytest.mark.parametrize("tree", ["fashion-mnist-10k", *(name for name in REAL if not name.startswith("npz"))], indirect=True)
def test_the_test_split_is_not_the_training_split(tree: Tree, parts: dict[str, ImageSet]) -> None:
    shared = {image for image, _ in rows(parts["train"])} & {image for image, _ in rows(parts["test"])}
    assert len(shared) <= len(parts["test"]) // 100, "published splits have next to no duplicates"


@pytest.mark.parametrize("name", NEEDS_FILES)
def test_files_that_are_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, where it was looked for, and how to get it."""
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path / "absent"))
    values = {"npz": {"train": "mine.npz"}}.get(name, {})
    with pytest.raises(ArtifactError) as caught:
        open_dataset({"name": name, **values}).load("train")
    error = caught.value
    assert error.exit_code == 5 and error.what and error.fix
    assert str(tmp_path / "absent") in error.where or error.where == "mine.npz"
    if name not in ("folder", "npz"):
        assert "ROBUSTKD_DATA" in error.fix and ("http" in error.fix or "download=True" in error.fix)


def test_the_root_of_a_command_line_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SYNTHETIC["cifar10"](tmp_path)
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path / "absent"))
    assert len(open_dataset("cifar10", tmp_path).load("test")) == 20
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path))
    assert len(open_dataset("cifar10").load("test")) == 20


def test_without_the_full_set_the_embedded_images_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "absent")
    part = open_dataset("fashion-mnist", tmp_path).load("train")
    assert len(part) == 10_000 and "embedded" in part.note
