"""Strong augmentations by name. Training images only: held-out images and evaluation are never augmented.

`train.augment` is a set; the order is always crop, flip, the ones of single images (autoaugment, randaugment,
trivialaugment, erasing, each drawn anew for every image, on the stored pixels), then the ones that combine the images of
a batch (mixup, cutmix, in float). Labels are not mixed, so the last two want a method that looks at none.

Single images go through torchvision.transforms.v2, which draws from torch's global generator: it is seeded from the place
of the batch and put back afterwards. They are worked on by the CPU, whatever the training device: launching their dozen
small kernels for each image would take a GPU longer, and a run draws the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Generator, Tensor

from robustkd.catalog import needed

SMALL = 32
"""Side in pixels up to which AutoAugment takes the policy found on CIFAR-10."""


class Strong:
    """Augmentations of single images, in the order of the module's table.

    Args:
        names: of `train.augment`; those of no concern here are passed over.
        dataset: its name; AutoAugment has a policy of its own for SVHN.
        side: the longer side of an image in pixels.

    Raises:
        RequirementError: one is asked for and torchvision does not import.
    """

    def __init__(self, names: Collection[str], *, dataset: str, side: int) -> None:
        wanted = [name for name in _MAKERS if name in names]
        v2 = _transforms(wanted) if wanted else None
        self._steps: list[Callable[[Tensor], Tensor]] = [_MAKERS[name](v2, policy(dataset, side)) for name in wanted]

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._steps)

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """New images of the same shape (B, C, H, W), type and range; a function of images and seed alone.

        Args:
            images: uint8, or float in [0, 1]; on the CPU, of 1 or 3 channels.
            seed: of all draws for this batch.
        """
        if not self._steps:
            return images
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return torch.stack([self._one(image) for image in images])

    def _one(self, image: Tensor) -> Tensor:
        for step in self._steps:
            image = step(image)
        return image


def policy(dataset: str, side: int) -> str:
    """AutoAugment's policy: SVHN's for SVHN, CIFAR-10's for images up to 32 pixels, ImageNet's for larger ones."""
    if "svhn" in dataset.lower():
        return "SVHN"
    return "CIFAR10" if side <= SMALL else "IMAGENET"


_MAKERS: dict[str, Callable[[Any, str], Callable[[Tensor], Tensor]]] = {
    # Cubuk et al., CVPR 2019; Cubuk et al., NeurIPS 2020: two operations of magnitude 9 of 30;
    # Mueller & Hutter, ICCV 2021: one operation, "wide"; Zhong et al., AAAI 2020: a black box in every second image
    "autoaugment": lambda v2, found_on: v2.AutoAugment(v2.AutoAugmentPolicy[found_on]),
    "randaugment": lambda v2, found_on: v2.RandAugment(),
    "trivialaugment": lambda v2, found_on: v2.TrivialAugmentWide(),
    "erasing": lambda v2, found_on: v2.RandomErasing(),
}


def _transforms(wanted: list[str]) -> Any:
    what = f"train.augment: {', '.join(wanted)} needs torchvision"
    return needed("torchvision.transforms.v2", what, fix="pip install 'robustkd[train]', or leave it out")


def combine(x: Tensor, names: Collection[str], rng: Generator) -> Tensor:
    """Mixup or CutMix (Zhang et al., ICLR 2018; Yun et al., ICCV 2019), alpha 1, each image with another of the batch.

    Every image draws its own share, uniform in [0, 1] (Beta(1, 1)); with both names each image gets one of the two.

    Args:
        x: float images (B, C, H, W) in [0, 1].
        names: of `train.augment`.
        rng: on the device of `x`.
    """
    if not {"mixup", "cutmix"} & set(names):
        return x
    partner = x[torch.randperm(len(x), generator=rng, device=x.device)]
    share = torch.rand(len(x), generator=rng, device=x.device)
    if "cutmix" not in names:
        return _mixup(x, partner, share)
    cut = torch.where(_box(x, share, rng), partner, x)
    if "mixup" not in names:
        return cut
    coin = torch.rand(len(x), generator=rng, device=x.device) < 0.5
    return torch.where(coin[:, None, None, None], cut, _mixup(x, partner, share))


def _mixup(x: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    # lerp of two equal numbers may leave [0, 1] by a rounding
    return torch.lerp(partner, x, share[:, None, None, None]).clamp(0, 1)


def _box(x: Tensor, share: Tensor, rng: Generator) -> Tensor:
    """A mask (B, 1, H, W) of one box an image: area 1 - share, centre uniform, cut off at the border."""
    centre = torch.rand(2, len(x), generator=rng, device=x.device)
    half = (1 - share).sqrt() / 2
    rows, columns = (_between(centre[axis], half, x.shape[2 + axis]) for axis in (0, 1))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _between(centre: Tensor, half: Tensor, size: int) -> Tensor:
    """(B, size): the pixels whose middle is within `half` of `centre`, in parts of the side."""
    middle = (torch.arange(size, device=centre.device) + 0.5) / size
    return (middle[None] - centre[:, None]).abs() < half[:, None]
