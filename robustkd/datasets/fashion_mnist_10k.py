"""The embedded part of Fashion-MNIST: 10,000 training and 2,000 test images, the same on every machine."""

from __future__ import annotations

from typing import ClassVar, Literal

from robustkd.datasets._base import DatasetConfig, Facts, ImageSet, Split
from robustkd.datasets.fashion_mnist import embedded


class FashionMNIST10kConfig(DatasetConfig, frozen=True):
    """The subset of Fashion-MNIST inside the package; needs no download."""

    summary: ClassVar[str] = "the embedded 10,000 + 2,000 images of Fashion-MNIST; needs no files"
    facts: ClassVar[Facts | None] = Facts((1, 28, 28), 10, train=10_000)
    name: Literal["fashion-mnist-10k"] = "fashion-mnist-10k"

    def load(self, split: Split) -> ImageSet:
        """10,000 training or 2,000 test images, balanced over the classes."""
        return embedded(split, self.name)


ENTRY = FashionMNIST10kConfig
