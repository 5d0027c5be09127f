"""A running average of the student's weights, on torch.optim.swa_utils: what is measured and handed on is the average.

EMA takes the weights after every step and averages the running statistics of batch norm along with them. SWA
(Izmailov et al., UAI 2018) takes them at the end of every epoch, and since no network with the mean weights has ever run,
its statistics are measured by a pass over the training images before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from robustkd.methods._base import Clock
from robustkd.recipe.addons import AverageConfig

DECAY = 0.999


class Average:
    """The averaged student.

    Args:
        student: the bare network.
        start: the 0-based epoch from which its weights count.
        steps: of an epoch.
    """

    def __init__(self, student: nn.Module, model: AveragedModel, *, start: int, steps: int) -> None:
        self._student, self._model, self._start, self._steps = student, model.requires_grad_(False), start, steps

    @property
    def net(self) -> nn.Module:
        """The averaged network; until its first weights, nothing that should be used."""
        return self._model.module

    @property
    def taken(self) -> int:
        """How many times weights were taken in."""
        return int(self._model.n_averaged)

    @taken.setter
    def taken(self, count: int) -> None:
        self._model.n_averaged.fill_(count)

    def after_step(self, clock: Clock) -> None:
        """Take in the student's weights, if this step is one whose weights count."""
        if clock.epoch >= self._start and self._due(clock):
            self._model.update_parameters(self._student)

    def settle(self, images: Iterable[Tensor]) -> None:
        """Make the average ready to be measured; `images` are batches (N, C, H, W) of the training images."""

    def _due(self, clock: Clock) -> bool:
        return True


class Ema(Average):
    """After every step, average <- decay * average + (1 - decay) * student."""

    def __init__(self, student: nn.Module, *, decay: float, start: int, steps: int) -> None:
        blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

        def update(average: Any, now: Any, taken: Any) -> None:
            if average[0].is_floating_point():
                blend(average, now, taken)
            else:  # the step counters of batch norm
                torch._foreach_copy_(average, now)

        super().__init__(student, AveragedModel(student, multi_avg_fn=update, use_buffers=True), start=start, steps=steps)


class Swa(Average):
    """The mean of the weights at the end of each epoch."""

    def __init__(self, student: nn.Module, *, start: int, steps: int) -> None:
        mean = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        super().__init__(student, AveragedModel(student, multi_avg_fn=mean), start=start, steps=steps)

    def settle(self, images: Iterable[Tensor]) -> None:
        """Measure the running statistics anew."""
        update_bn(images, self.net)

    def _due(self, clock: Clock) -> bool:
        return (clock.step + 1) % self._steps == 0


def average_of(config: AverageConfig, student: nn.Module, *, steps: int) -> Average:
    """The average a recipe asks for."""
    if config.name == "ema":
        decay = DECAY if config.decay is None else config.decay
        return Ema(student, decay=decay, start=config.start_epoch, steps=steps)
    return Swa(student, start=config.start_epoch, steps=steps)
