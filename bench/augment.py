"""augment: one batch of 128 images of 3x32x32 with each augmentation, against the same batch with crop and flip alone.

On one core, for that is what a training process has to spare beside the attack. The ratio is crop and flip's time over
the augmentation's (below 1: it costs that much more), `per_image` the seconds an image takes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch

from bench.timing import Row, interleave
from robustkd.datasets._base import ImageSet
from robustkd.recipe.schema import Augmentation, TrainConfig
from robustkd.training.batches import Batches, Place

BATCH, SHAPE = 128, (3, 32, 32)
CHEAP: tuple[Augmentation, ...] = ("crop", "flip")
OTHERS: tuple[Augmentation, ...] = tuple(name for name in get_args(Augmentation) if name not in CHEAP)


def rows(*, quick: bool, names: tuple[Augmentation, ...] = OTHERS, pairs: int | None = None) -> Iterator[Row]:
    for name in names:
        ours, reference = (batches((*CHEAP, *more)) for more in ((name,), ()))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            row = interleave(
                f"augment/{name}",
                lambda ours=ours: draw(ours),
                lambda reference=reference: draw(reference),
                pairs=pairs or (11 if quick else 51),
                warm=2,
            )
        finally:
            torch.set_num_threads(threads)
        yield {**row, "per_image": row["ours"] / BATCH, "threads": 1}


def batches(names: tuple[Augmentation, ...]) -> Batches:
    """Random images, in epochs of one batch."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *SHAPE), dtype=np.uint8)
    train = ImageSet(images, np.arange(BATCH) % 10, tuple(map(str, range(10))), "random", "train")
    config = TrainConfig(batch_size=BATCH, augment=names)
    return Batches(train, config, seed=0, place=Place(0, 1, torch.device("cpu")))


def draw(ours: Batches) -> None:
    for _ in ours.epoch(0):
        pass
