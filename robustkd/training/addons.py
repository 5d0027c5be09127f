"""The add-ons of a run behind one object, so that the loop reads as the papers write it.

`outer` stands where the method's loss would, `around` encloses one step, and `outcome` is the network that is measured,
selected and handed on. Without add-ons these are the method itself, nothing, and the student: the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustkd.losses import entropy
from robustkd.methods._base import Batch, Clock, Method, Nets, Terms, fixed
from robustkd.methods._guidance import excess_entropy
from robustkd.recipe.addons import AddonsConfig
from robustkd.training.average import average_of
from robustkd.training.awp import Awp
from robustkd.training.guidance import Igdm, Outer
from robustkd.training.team import Team

Step = tuple[Nets, Batch, Terms]
"""The nets and the batch to take the loss on, and what the add-ons want in the log."""


class Addons:
    """What a recipe adds to its method.

    Args:
        method: the method they are added to.
        student: the bare student.
        steps: of an epoch.
        autocast: makes the precision context that losses are computed in.
    """

    def __init__(
        self,
        config: AddonsConfig,
        method: Method[Any, Any],
        student: nn.Module,
        *,
        team: Team,
        steps: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.config, self.method, self.student, self.team = config, method, student, team
        self.autocast = autocast
        self.outer: Outer = method if config.igdm is None else Igdm(method, alpha=config.igdm.alpha)
        self.awp = None if config.awp is None else Awp(student, gamma=config.awp.gamma, team=team)
        self.average = None if config.average is None else average_of(config.average, student, steps=steps)

    @property
    def outcome(self) -> nn.Module:
        """The averaged student where averaging has begun, else the student."""
        return self.average.net if self.average is not None and self.average.taken else self.student

    @property
    def nets(self) -> list[nn.Module]:
        """The networks of this run that gather running statistics, each process from its own images."""
        return [self.student] if self.average is None else [self.student, self.average.net]

    @contextmanager
    def around(self, nets: Nets, batch: Batch, state: Any, clock: Clock) -> Iterator[Step]:
        """One step: weights for the images, the student's weights shifted while inside, the average moved on after it."""
        batch, seen = self._weighted(nets, batch)
        with self._shifted(nets, batch, state, clock) as shift:
            yield nets, batch, {**seen, **shift}
        if self.average is not None:
            self.average.after_step(clock)

    def settle(self, images: Iterable[Tensor]) -> None:
        """Make `outcome` ready to be measured or written; `images` are batches of training images, read where needed."""
        if self.average is not None and self.average.taken:
            with self.autocast():
                self.average.settle(images)

    def _weighted(self, nets: Nets, batch: Batch) -> tuple[Batch, Terms]:
        """SAAD's weights; the smallest entropy is that of the batch over all processes."""
        if (config := self.config.entropy_weights) is None:
            return batch, {}
        with torch.no_grad(), self.autocast():
            logits = fixed(nets.robust, batch.x_adv)
            weights = excess_entropy(logits, scale=config.scale, lowest=self.team.smallest(entropy(logits).min()))
        return replace(batch, weights=weights), {"weight_mean": weights.mean()}

    @contextmanager
    def _shifted(self, nets: Nets, batch: Batch, state: Any, clock: Clock) -> Iterator[Terms]:
        if self.awp is None or self.config.awp is None or clock.epoch < self.config.awp.start_epoch:
            yield {}
            return

        def loss(proxy: nn.Module) -> Tensor:
            return self._ahead(replace(nets, student=proxy), batch, state, clock)

        with self.awp.shifted(loss) as shift:
            yield shift

    def _ahead(self, nets: Nets, batch: Batch, state: Any, clock: Clock) -> Tensor:
        """The loss this step would have without a shift.

        The method's state is that which the step would lead to, and is forgotten: only the pass at the shifted weights
        advances it, so that it advances once a step.
        """
        with self.autocast():
            parts, found = self.outer.loss(nets, batch, state, clock)
        found = self.team.mean({"loss": parts.detach(), **found})
        return self.outer.weigh(parts, self.method.advance(state, found, clock))
