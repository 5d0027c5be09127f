"""The contract of the attacks shelf: a config that looks for wrong answers inside the ball of a threat model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from robustkd.ascent import attacking
from robustkd.attacks._grid import on_grid
from robustkd.attacks._guard import Enough, Guard
from robustkd.threat import ThreatModel

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] to logits (N, K); differentiable where the attack needs gradients."""


class Found(NamedTuple):
    """What an attack returns.

    Attributes:
        x_adv: (N, C, H, W), in the ball and in [0, 1], in the order of the input.
        forwards: images sent through the model.
    """

    x_adv: Tensor
    forwards: int


class Attack(BaseModel, frozen=True, extra="forbid"):
    """What every attack has; subclasses add their knobs and `_search`."""

    summary: ClassVar[str] = ""
    needs: ClassVar[Literal["gradient", "logits", "labels"]] = "logits"
    grid: ClassVar[bool] = False
    """Whether it returns 8-bit images only."""
    per_image: ClassVar[bool] = False
    """Whether the randomness of an image depends on that image alone, not on its place or its batch."""
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    """The norms it knows."""
    name: str

    def obstacle(self, classes: int) -> str:
        """Why this attack cannot run against so many classes; empty where it can."""
        return ""

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int, enough: Enough | None = None
    ) -> Found:
        """Search the ball around each image for one that the model does not answer with y by a strict margin.

        Leaves no trace: global random states, training flags, parameter flags and gradients are as before.

        Args:
            model: the attacked model.
            x: clean images (N, C, H, W), float32 in [0, 1].
            y: labels (N,), int64.
            threat: the ball.
            seed: of all randomness; the same seed gives the same images.
            enough: which images that fool the model need not be searched further; it is asked of those that are wrong
                beyond rounding. Without it all of these leave.

        Returns:
            One image per input: the one that fooled the model, or the last one tried.
        """
        if not len(x) or threat.eps == 0:
            return Found(x.clone(), 0)
        with prepared(model), isolated(seed):
            guard = Guard(model, x, y, threat, enough)
            if self.obstacle(guard.classes) or threat.norm not in self.norms:
                return Found(x.clone(), guard.forwards)
            settled = guard.settle(self._search(guard, x, y, threat, seed))
            # projecting moves an 8-bit image by the rounding of float32
            return Found(on_grid(settled, x, threat) if self.grid else settled, guard.forwards)

    def _search(self, model: Guard, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        raise NotImplementedError


@contextmanager
def prepared(model: Model) -> Iterator[None]:
    """Evaluation mode and frozen parameters while a network is attacked; every flag is given back (defect A7)."""
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    with attacking(model) if isinstance(model, nn.Module) else nullcontext():
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed torch here and give torch, numpy and random their states back afterwards (defect A3)."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
