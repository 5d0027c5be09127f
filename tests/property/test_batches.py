"""Batches of any shape, number of processes and starting step: the same whether pixels are held or streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustkd.datasets._base import ImageSet
from robustkd.datasets._pixels import View
from robustkd.recipe.schema import TrainConfig
from robustkd.training.batches import Batches, Place

CPU = torch.device("cpu")
shapes = st.tuples(st.sampled_from([1, 3]), st.integers(28, 224), st.integers(28, 224))
seeds = st.integers(0, 2**31 - 1)
some = settings(max_examples=25)


def picture(shape: tuple[int, ...], value: int) -> np.ndarray[Any, Any]:
    return np.full(shape, value, np.uint8)


def numbered(n: int, shape: tuple[int, int, int]) -> ImageSet:
    """Image i is of the value 40 + i everywhere, and of the class i."""
    images = np.stack([picture(shape, 40 + i) for i in range(n)])
    return ImageSet(images, np.arange(n), tuple(map(str, range(n))), "numbered", "train")


def random(n: int, shape: tuple[int, int, int]) -> ImageSet:
    images = np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)
    return ImageSet(images, np.arange(n) % 2, ("a", "b"), "random", "train")


def made(images: ImageSet, size: int, seed: int, *, rank: int = 0, world: int = 1, augment: Any = (), **how: Any) -> Batches:
    config = TrainConfig(batch_size=size, augment=augment, pad=3)
    return Batches(images, config, seed=seed, place=Place(rank, world, CPU), **how)


def equal(left: list[tuple[int, Tensor, Tensor]], right: list[tuple[int, Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(left, right, strict=True)
    )


@some
@given(shape=shapes, n=st.integers(1, 6), size=st.integers(1, 4), seed=seeds, world=st.integers(1, 3), data=st.data())
def test_held_and_streamed_are_equal_from_any_step(
    shape: tuple[int, int, int], n: int, size: int, seed: int, world: int, data: st.DataObject
) -> None:
    rank, epoch = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, 3))
    here = {"rank": rank, "world": world, "augment": ("crop", "flip", "erasing")}
    held = made(random(n, shape), size, seed, stream="never", **here)
    streamed = made(random(n, shape), size, seed, stream="always", workers=0, **here)
    first = data.draw(st.integers(0, held.steps))
    whole, rest = list(held.epoch(epoch)), list(streamed.epoch(epoch, first=first))
    assert equal(whole[first:], rest)
    for _, x, _ in whole:
        assert x.dtype == torch.float32 and x.shape[1:] == shape and x.min() >= 0 and x.max() <= 1


@some
@given(
    n=st.integers(1, 40),
    size=st.integers(1, 16),
    seed=seeds,
    world=st.integers(1, 4),
    stream=st.sampled_from(["never", "always"]),
)
def test_all_processes_together_see_what_one_sees(n: int, size: int, seed: int, world: int, stream: Any) -> None:
    """Batch by batch; one that does not divide among the processes repeats its first images, and no other."""
    images = numbered(n, (1, 28, 28))
    alone = list(made(images, size, seed).epoch(0))
    parts = [list(made(images, size, seed, rank=r, world=world, stream=stream, workers=0).epoch(0)) for r in range(world)]
    for step, (_, x, y) in enumerate(alone):
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y + 40), "an image keeps its label"
        shares = [part[step][2].tolist() for part in parts]
        assert len({len(share) for share in shares}) == 1, "gradients of all processes count the same"
        together = [label for row in zip(*shares, strict=True) for label in row]
        assert together[: len(y)] == y.tolist()
        assert together[len(y) :] == np.resize(y.numpy(), len(together))[len(y) :].tolist()
    assert sorted(label for _, _, y in alone for label in y.tolist()) == list(range(n)), "each image once an epoch"


@some
@given(n=st.integers(2, 30), seed=seeds)
def test_epochs_and_seeds_have_orders_of_their_own(n: int, seed: int) -> None:
    batches = made(numbered(n, (1, 28, 28)), n, seed)
    first, again = (next(iter(batches.epoch(0)))[2] for _ in range(2))
    assert torch.equal(first, again)
    orders = {tuple(next(iter(batches.epoch(epoch)))[2].tolist()) for epoch in range(12)}
    assert len(orders) > 1


@some
@given(n=st.integers(1, 20), data=st.data())
def test_a_view_is_the_rows_it_names(n: int, data: st.DataObject) -> None:
    base = np.random.default_rng(n).integers(0, 256, (n, 1, 3, 2), dtype=np.uint8)
    rows = np.asarray(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), np.int64)
    view = View(base, rows)
    assert view.shape == (len(rows), 1, 3, 2) and view.nbytes == base[rows].nbytes
    assert np.array_equal(np.asarray(view), base[rows]) and np.array_equal(np.stack(list(view)), base[rows])
    index = np.asarray(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)), np.int64)
    assert np.array_equal(np.asarray(view.take(index)), base[rows][index])
