"""A teacher measured after loading: does it answer as is said of it? This is what finds wrong normalisation.

Clean accuracy and PGD-10 on a sample of the test images, against the figures as published or measured. A sample has
noise, and the published figures are of other images: a figure is contradicted only when it lies outside an exact
99.9 % interval (Clopper & Pearson, 1934) and two points beyond it. Where the published clean figure is of exactly the
images that were measured, half a point is enough: so near are the constants of CIFAR-10 and CIFAR-100.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from robustkd.bundle import write_json
from robustkd.datasets._base import DatasetConfig, ImageSet, balanced
from robustkd.errors import ArtifactError, ConfigError, NumericsError
from robustkd.recipe.schema import Figures
from robustkd.signals import check
from robustkd.stats import clopper_pearson
from robustkd.training.evaluate import evaluate
from robustkd.training.teachers import Expected

ALPHA = 0.001
SLACK = 0.02
EXACT = 0.005
SAMPLE = 1000
"""Clean images where the card does not say how many, on a CPU."""
OFFICIAL = 10_000
"""Test images of the data sets that published figures are of; a part of them is not what was published."""
UNKNOWN_N = 200
"""Clean images of a teacher of which nothing is known to hold it against: only for people to look at."""
_BATCH = 100


class Verifier:
    """Measures the teachers of a run, each once: what came out is kept in a file, so that a resumed run need not.

    Args:
        dataset: whose test images are taken.
        device: where the teachers are.
        record: a JSON file of what was measured before.
        say: called with a line about each teacher.
    """

    def __init__(self, dataset: DatasetConfig, device: torch.device, record: Path, say: Callable[[str], None]) -> None:
        self.dataset, self.device, self.record, self.say = dataset, device, record, say

    def __call__(self, net: nn.Module, said: Expected) -> str:
        """What was measured, in words.

        Raises:
            NumericsError: the teacher is not what is said of it.
        """
        before = self._before()
        if said.digest in before:
            return before[said.digest]
        told = self._told(net, said)
        write_json(self.record, before | {said.digest: told})
        return told

    def _told(self, net: nn.Module, said: Expected) -> str:
        try:
            images = self._images
        except (ArtifactError, ConfigError) as error:
            self.say(f"teacher {said.name} is not measured: no test images ({error.what})")
            return "not measured: no test images"
        told = measure(net, said, images, self.device)
        held = "as expected" if said.figures.model_dump(exclude_none=True) else "nothing is known to hold it against"
        self.say(f"teacher {said.name}: {told}; {held}")
        return told

    @cached_property
    def _images(self) -> ImageSet:
        return self.dataset.load("test")

    def _before(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self.record.read_bytes())
        except (OSError, ValueError):
            return {}
        return found


def measure(net: nn.Module, said: Expected, images: ImageSet, device: torch.device) -> str:
    """Measure a teacher against what is said of it. The seeds are its own: no other randomness is touched.

    Args:
        net: in eval mode, on `device`; images (N, C, H, W) in [0, 1] -> logits.
        said: accuracies as fractions; without a robust one, only clean images are measured.
        images: the test split.
        device: where it runs.

    Returns:
        What was measured, in words.

    Raises:
        NumericsError: it lies outside what is said.
    """
    figures, threat, sample = said.figures, said.threat, said.sample
    known = bool(figures.model_dump(exclude_none=True))
    part = _sample(images, _clean_n(said, len(images), device) if known else UNKNOWN_N)
    told = [_held("clean", _right(net, part, device), len(part), said, whole=said.exact and len(part) == OFFICIAL)]
    if threat is not None and sample.pgd10 and not (figures.pgd10 is None and figures.autoattack is None):
        part = _sample(images, sample.pgd10)
        robust = evaluate(net, part, threat, seed=0, device=device, batch=_BATCH).robust
        told.append(_held("PGD-10", round(robust * len(part)), len(part), said))
    return ", ".join(told)


def _clean_n(said: Expected, there: int, device: torch.device) -> int:
    return said.sample.clean or (there if device.type == "cuda" else SAMPLE)


def _sample(images: ImageSet, n: int) -> ImageSet:
    return images.take(balanced(images.labels, min(n, len(images)), seed=0))


def _right(net: nn.Module, images: ImageSet, device: torch.device) -> int:
    x, y = torch.from_numpy(images.floats()), torch.from_numpy(images.labels)
    right = 0
    with torch.no_grad():
        for first in range(0, len(images), _BATCH):
            check()
            a, b = x[first : first + _BATCH].to(device), y[first : first + _BATCH].to(device)
            right += int((net(a).argmax(1) == b).sum())
    return right


def _held(kind: str, right: int, n: int, said: Expected, *, whole: bool = False) -> str:
    """A figure in words, if it agrees. AutoAttack is the stronger attack: its figure is only a floor of PGD-10's."""
    low, high = (right / n,) * 2 if whole else clopper_pearson(right, n, ALPHA)
    slack = EXACT if whole else SLACK
    wanted, floor = _bounds(kind, said.figures)
    if (floor is not None and high + slack < floor) or (wanted is not None and low - slack > wanted):
        expected = f"{wanted:.1%}" if wanted is not None else f"at least {floor:.1%}"
        raise NumericsError(
            f"teacher {said.name} does not answer as reported: {kind} {right / n:.1%} of {n} images, expected {expected}",
            where=said.where,
            fix="check its normalisation (model.normalize), file, class order and image range; or add --no-verify-teacher",
        )
    return f"{kind} {right / n:.1%} of {n} images"


def _bounds(kind: str, figures: Figures) -> tuple[float | None, float | None]:
    """The figure to be met, and the one not to be missed from below."""
    if kind == "clean":
        return figures.clean, figures.clean
    return figures.pgd10, figures.autoattack if figures.pgd10 is None else figures.pgd10
