"""Batches of augmented images on the training device; crop, flip and mixing work on whole batches.

The order of an epoch and every augmentation are functions of (seed, epoch, step, rank) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from robustkd.datasets._base import ImageSet, Stream, balanced
from robustkd.recipe.schema import Recipe, TrainConfig
from robustkd.training.augment import Strong, combine
from robustkd.training.pixels import stored
from robustkd.training.seeds import generator, seed_of

ORDER, AUGMENT, ATTACK, HOLDOUT, STRONG = 1, 2, 3, 4, 5
"""Purposes of a random stream; the last part of its seed."""


@dataclass(frozen=True)
class Place:
    """One process among all: rank of world, and its device."""

    rank: int
    world: int
    device: torch.device


def divide(images: ImageSet, recipe: Recipe) -> tuple[ImageSet, ImageSet]:
    """The training images and those held out for checkpoint selection, a random choice by seed."""
    config = recipe.dataset
    order = balanced(images.labels, len(images), seed_of(recipe.seed, HOLDOUT) % 2**32)
    held = min(config.holdout, len(images) // 2)
    train = order[held:]
    if config.train_n is not None:
        train = train[: config.train_n]
    return images.share(np.sort(train)), images.take(np.sort(order[:held])).in_memory()


class Batches:
    """The training images, cut into one epoch's batches at a time.

    Args:
        images: the training images, in memory or as pictures to be read.
        train: batch size and augmentation.
        seed: of order and augmentation.
        place: this process; it gets its share of every batch.
        stream: whether stored pixels are read while training; the batches are the same either way.
        workers: processes that read them; left out, by cores.

    Raises:
        RequirementError: a strong augmentation is asked for and torchvision does not import.
    """

    def __init__(
        self,
        images: ImageSet,
        train: TrainConfig,
        *,
        seed: int,
        place: Place,
        stream: Stream = "auto",
        workers: int | None = None,
    ) -> None:
        self.train, self.seed, self.place = train, seed, place
        self.strong = Strong(train.augment, dataset=images.name, side=max(images.shape[1:]))
        self.home = torch.device("cpu") if self.strong else place.device
        self.stored = stored(images, self.home, stream=stream, workers=workers)
        self.labels = torch.from_numpy(images.labels).to(place.device)
        self.steps = -(-len(images) // train.batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, x, y) of this rank from step `first` on; x is float32 (B, C, H, W) in [0, 1]."""
        order = self._order(epoch)
        picks = [self._mine(order, step) for step in range(first, self.steps)]
        for step, (rows, pixels) in enumerate(zip(picks, self.stored.batches(picks), strict=True), start=first):
            images = self._augmented(pixels, epoch, step)
            yield step, images.to(self.place.device), self.labels[torch.from_numpy(rows).to(self.place.device)]

    def _mine(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """The rows of a step that are for this rank."""
        rows = order[step * self.train.batch_size : (step + 1) * self.train.batch_size]
        # ranks get equally many, for their gradients count the same: a batch that does not divide repeats its first
        rows = np.resize(rows, -(-len(rows) // self.place.world) * self.place.world)
        return rows[self.place.rank :: self.place.world]

    def _augmented(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Float images; the cheap draws come from one stream, those of torchvision from another."""
        here = (self.seed, epoch, step, self.place.rank)
        rng = generator(*here, AUGMENT, device=self.home)
        images = self.strong(augment(images, self.train, rng), seed_of(*here, STRONG))
        return combine(to_unit(images), self.train.augment, rng)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(seed_of(self.seed, epoch, ORDER))
        return rng.permutation(len(self.labels))


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def augment(x: Tensor, train: TrainConfig, rng: Generator) -> Tensor:
    """Random crop with zero padding and random horizontal flip, drawn per image for the whole batch."""
    if "crop" in train.augment and train.pad:
        x = random_crop(x, train.pad, rng)
    if "flip" in train.augment:
        flip = torch.rand(len(x), generator=rng, device=x.device) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return x


def random_crop(x: Tensor, pad: int, rng: Generator) -> Tensor:
    """Each image shifted by up to `pad` pixels in either direction, zeros moving in."""
    count, channels, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    shift = torch.randint(0, 2 * pad + 1, (2, count), generator=rng, device=x.device)
    rows = shift[0][:, None] + torch.arange(height, device=x.device)
    columns = shift[1][:, None] + torch.arange(width, device=x.device)
    image = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
