"""Folders of picture files, one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet, Split
from robustkd.errors import ArtifactError, RequirementError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("torchvision", reason="needs torchvision")


def load(path: Path, split: Split = "test", **values: Any) -> ImageSet:
    part: ImageSet = Shelf("datasets").get("folder")(path=path, **values).load(split)
    return part


def picture(seed: int, *, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Any:
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def tree(folder: Path, splits: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("dog", "cat")) -> Path:
    for split in splits:
        for c, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                picture(10 * c + i).save(folder / split / name / f"{i}.png")
    return folder


def test_classes_are_sorted_and_pixels_exact(tmp_path: Path) -> None:
    part = load(tree(tmp_path), "train")
    assert part.classes == ("cat", "dog") and part.labels.tolist() == [0, 0, 1, 1]
    assert part.images.shape == (4, 3, 8, 8) and part.images.dtype == np.uint8 and part.split == "train"
    expected = np.asarray(picture(1)).transpose(2, 0, 1)  # dog/1.png
    assert np.array_equal(part.images[3], expected)


@pytest.mark.parametrize(
    ("splits", "found"), [(("train", "test"), "test"), (("train", "val"), "val"), (("test", "val"), "test")]
)
def test_test_or_val_serves_as_test(tmp_path: Path, splits: tuple[str, ...], found: str) -> None:
    tree(tmp_path, splits)
    picture(99).save(tmp_path / found / "cat" / "2.png")
    assert len(load(tmp_path)) == 5


def test_a_folder_of_classes_is_one_test_split(tmp_path: Path) -> None:
    tree(tmp_path, ("mine",))
    assert len(load(tmp_path / "mine")) == 4
    with pytest.raises(ArtifactError, match="no train split"):
        load(tmp_path / "mine", "train")


def test_a_training_folder_alone_has_no_test_split(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no test split"):
        load(tree(tmp_path, ("train",)))


def test_the_path_may_be_relative_to_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "signs")
    assert len(load(Path("signs"), root=tmp_path)) == 4
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path))
    assert len(load(Path("signs"))) == 4
    assert len(Shelf("datasets").get("folder")(root=tmp_path / "signs").load("test")) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_pictures_become_the_channels_asked_for(tmp_path: Path, channels: int) -> None:
    tree(tmp_path)
    picture(5, mode="L").save(tmp_path / "test" / "cat" / "grey.png")
    picture(6).convert("RGBA").save(tmp_path / "test" / "cat" / "see-through.png")
    picture(7).convert("P").save(tmp_path / "test" / "cat" / "palette.png")
    picture(8).save(tmp_path / "test" / "dog" / "photo.jpg", quality=95)
    part = load(tmp_path, channels=channels)
    assert part.images.shape == (8, channels, 8, 8)
    grey = np.asarray(picture(5, mode="L"))
    index = 2  # 0.png, 1.png, grey.png
    assert all(np.array_equal(part.images[index, c], grey) for c in range(channels))


def test_pictures_of_many_sizes_need_a_size(tmp_path: Path) -> None:
    tree(tmp_path)
    picture(5, size=(20, 10)).save(tmp_path / "test" / "dog" / "wide.png")
    with pytest.raises(ArtifactError, match=r"wide\.png is 20x10 pixels, not 8x8") as caught:
        load(tmp_path)
    assert caught.value.where.endswith("dog/wide.png") and "dataset.size" in caught.value.fix
    assert load(tmp_path, size=6).images.shape == (5, 3, 6, 6)


def test_the_centre_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    assert (load(tmp_path, size=4).images == 255).all()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "renamed"])
def test_a_broken_picture_is_named(tmp_path: Path, damage: str) -> None:
    tree(tmp_path)
    file = tmp_path / "test" / "cat" / "1.png"
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "text": b"not a picture", "empty": b"", "renamed": b"\x00" * 99}[damage])
    with pytest.raises(ArtifactError, match=r"1\.png cannot be read as a picture") as caught:
        load(tmp_path)
    assert caught.value.where == str(file) and caught.value.exit_code == 5


def test_sixteen_bit_pictures_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    tree(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "test" / "cat" / "deep.png")
    with pytest.raises(ArtifactError, match="more than 8 bits"):
        load(tmp_path)


def test_splits_must_have_the_same_classes(tmp_path: Path) -> None:
    """Labels are positions among the sorted names: one more class would shift them all."""
    tree(tmp_path, ("train",), ("cat", "dog"))
    tree(tmp_path, ("test",), ("ape", "cat", "dog"))
    with pytest.raises(ArtifactError, match="train and test differ in the classes ape"):
        load(tmp_path)


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no pictures"):
        load(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(ArtifactError, match="no pictures"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "absent")


def test_without_torchvision_the_install_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
    with pytest.raises(RequirementError) as caught:
        load(tmp_path)
    assert "pip install 'robustkd[train]'" in caught.value.fix and caught.value.exit_code == 4
