"""Images that are read while training give the same batches as images in memory, and no picture is held twice."""

from __future__ import annotations

import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustkd.bundle import Bundle
from robustkd.catalog import Shelf
from robustkd.datasets import _base
from robustkd.datasets._base import ImageSet
from robustkd.datasets._pixels import Pictures, View
from robustkd.errors import ArtifactError, Interrupted
from robustkd.methods.pgd_at import PgdAt
from robustkd.models._files import read_state
from robustkd.recipe.schema import Recipe, TrainConfig
from robustkd.training.batches import Batches, Place, divide
from robustkd.training.pixels import InMemory, Streamed, stored
from robustkd.training.verb import distill

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("torchvision", reason="needs torchvision")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 6 test pictures of 12x12 pixels in two classes."""
    base, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, each in (("train", 20), ("test", 3)):
        for name in ("cat", "dog"):
            (base / split / name).mkdir(parents=True)
            for i in range(each):
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(base / split / name / f"{i:03}.png")
    return base


def load(path: Path, split: Any = "train", **values: Any) -> ImageSet:
    part: ImageSet = Shelf("datasets").get("folder")(path=path, **values).load(split)
    return part


def recipe(path: Path, **dataset: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "dataset": {"name": "folder", "path": str(path), "holdout": 10, **dataset},
            "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
            "method": {"name": "pgd-at"},
            "inner": {"steps": 1},
            "train": {"epochs": 2, "batch_size": 8, "threads": 1, "tensorboard": False, "save_every": 2},
        }
    )


def batches(images: ImageSet, *, rank: int = 0, world: int = 1, **how: Any) -> Batches:
    config = TrainConfig(batch_size=8, augment=("crop", "flip", "erasing", "mixup"), pad=2)
    return Batches(images, config, seed=3, place=Place(rank, world, CPU), **how)


def same(left: list[tuple[int, Tensor, Tensor]], right: list[tuple[int, Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(left, right, strict=True)
    )


# --- the same batches


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_in_memory(folder: Path, world: int, workers: int) -> None:
    held, streamed = load(folder, stream="never"), load(folder, stream="always")
    assert isinstance(held.images, np.ndarray) and isinstance(streamed.images, Pictures)
    assert held.sha256 == streamed.sha256 and held.shape == streamed.shape and len(held) == len(streamed)
    for rank in range(world):
        here = {"rank": rank, "world": world}
        left, right = batches(held, stream="never", **here), batches(streamed, stream="always", workers=workers, **here)
        assert isinstance(left.stored, InMemory) and isinstance(right.stored, Streamed)
        assert same(list(left.epoch(1)), list(right.epoch(1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_epoch_can_be_entered_in_its_middle(folder: Path, workers: int) -> None:
    stream = batches(load(folder, stream="always"), stream="always", workers=workers)
    assert same(list(stream.epoch(0))[3:], list(stream.epoch(0, first=3)))


def test_arrays_in_memory_stream_too(folder: Path) -> None:
    held = load(folder, stream="never")
    stream = batches(held, stream="always")
    assert isinstance(stream.stored, Streamed) and same(list(stream.epoch(0)), list(batches(held).epoch(0)))


def test_the_draws_of_a_run_do_not_depend_on_streaming(folder: Path) -> None:
    stream = batches(load(folder, stream="always"), stream="always", workers=1)
    before = torch.get_rng_state()
    list(stream.epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_images_are_held_out(folder: Path) -> None:
    asked = {stream: recipe(folder, stream=stream) for stream in ("never", "always")}
    parts = {stream: divide(r.dataset.load("train"), r) for stream, r in asked.items()}
    for one, other in zip(parts["never"], parts["always"], strict=True):
        assert one.sha256 == other.sha256
    train, held = parts["always"]
    assert isinstance(train.images, Pictures), "training images stay on disk"
    assert isinstance(held.images, np.ndarray), "held-out images are looked at every epoch"
    assert not {i.tobytes() for i in np.asarray(train.images)} & {i.tobytes() for i in held.images}


# --- the choice


def test_size_decides_unless_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40 * 3 * 12 * 12
    for limit, streams in ((size - 1, True), (size, False)):
        monkeypatch.setattr(_base, "STREAM_ABOVE", limit)
        monkeypatch.setattr("robustkd.training.pixels.STREAM_ABOVE", limit)
        part = load(folder)
        assert isinstance(part.images, Pictures) is streams
        assert isinstance(stored(part, CPU, stream="auto", workers=0), Streamed) is streams
        plain = load(folder, stream="never")
        assert isinstance(stored(plain, CPU, stream="auto", workers=0), Streamed) is streams


def test_what_else_reads_a_streamed_split(folder: Path) -> None:
    held, streamed = (load(folder, "test", stream=stream) for stream in ("never", "always"))
    index = np.array([5, 0, 3])
    assert np.array_equal(held.take(index).floats(), streamed.take(index).floats())
    assert held.take(index).sha256 == streamed.take(index).sha256
    assert len(streamed.take(index[:0])) == 0
    assert np.array_equal(streamed.images[1], held.images[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_from_whatever_process(folder: Path, tmp_path: Path, workers: int) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes((folder / "train" / name / "000.png").read_bytes())
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no picture")
    stream = batches(load(tmp_path, stream="always"), stream="always", workers=workers)
    with pytest.raises(ArtifactError, match=r"1\.png cannot be read as a picture") as caught:
        list(stream.epoch(0))
    assert caught.value.where.endswith("dog/1.png") and caught.value.fix == "replace it"


# --- memory


def test_a_folder_is_not_held_twice(tmp_path: Path) -> None:
    """Traced allocations of load and division stay near the pixels' own size; streamed, far below it."""
    rng = np.random.default_rng(0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(tmp_path / "train" / "a" / f"{i}.bmp")
    size = 60 * 3 * 96 * 96
    peaks = {}
    for stream in ("never", "always"):
        asked = recipe(tmp_path, stream=stream, holdout=4)
        load(tmp_path, stream=stream).take(np.arange(2)).in_memory()  # what imports take is not meant
        tracemalloc.start()
        train, _ = divide(asked.dataset.load("train"), asked)
        source = stored(train, CPU, stream=stream, workers=0)
        next(iter(source.batches([np.arange(4)])))
        peaks[stream] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert size < peaks["never"] < 1.5 * size
    assert peaks["always"] < 0.5 * size


def test_a_small_choice_is_copied_so_that_the_rest_can_go() -> None:
    whole = ImageSet(np.zeros((10, 1, 4, 4), np.uint8), np.zeros(10, np.int64), ("a",), "toy", "train")
    most, few = whole.share(np.arange(8)), whole.share(np.arange(3))
    assert isinstance(most.images, View) and most.images.base is whole.images
    assert isinstance(few.images, np.ndarray) and few.images.base is None


# --- a whole run


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask for a stop, as a signal would, after some outer losses."""
    loss, left = PgdAt.loss, [steps]

    def counted(self: PgdAt, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args)

    monkeypatch.setattr(PgdAt, "loss", counted)


def end(run: Path) -> dict[str, Tensor]:
    return read_state(run / "checkpoint" / "last.safetensors")


def test_a_streamed_run_stopped_within_an_epoch_ends_as_one_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(recipe(folder, stream="never"), tmp_path / "held")
    streamed = recipe(folder, stream="always", workers=1)
    distill(streamed, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 3)
        distill(streamed, tmp_path / "cut")
    assert not (tmp_path / "cut" / "checkpoint").exists()
    distill(streamed, tmp_path / "cut", resume=True)
    held, whole, cut = (end(tmp_path / name) for name in ("held", "whole", "cut"))
    for other in (whole, cut):
        assert held.keys() == other.keys() and all(torch.equal(held[key], other[key]) for key in held)
    manifests = [Bundle.open(tmp_path / name / "checkpoint", kind="checkpoint").manifest for name in ("held", "cut")]
    assert len({(m.model_extra or {})["training"]["data_sha256"] for m in manifests}) == 1
