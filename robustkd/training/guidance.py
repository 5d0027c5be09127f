"""IGDM around any method's outer loss, and the wrapper by which it shares a pass the method makes anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustkd.methods._base import Batch, Clock, Method, Nets, Terms, fixed, terms
from robustkd.methods._guidance import difference_gap, mirrored, ramp


class Outer(Protocol):
    """The outer problem as the loop takes it; a method is one."""

    def loss(self, nets: Nets, batch: Batch, state: Any, clock: Clock) -> tuple[Tensor, Terms]:
        """See `Method.loss`."""

    def weigh(self, parts: Tensor, state: Any) -> Tensor:
        """See `Method.weigh`."""


class Igdm:
    """A method's outer loss plus alpha (epoch/E) bmean KL( softmax(dT) || softmax(dS) ), per image times its weight.

    Lee et al., "Indirect Gradient Matching for Adversarial Robust Distillation", ICLR 2025 (methods.md, 6.1). The
    method's own pass on x' serves dS; the pass on x - d follows the method's passes.
    """

    def __init__(self, method: Method[Any, Any], *, alpha: float) -> None:
        self.method, self.alpha = method, alpha
        self._shape = torch.Size()

    def loss(self, nets: Nets, batch: Batch, state: Any, clock: Clock) -> tuple[Tensor, Terms]:
        """The method's parts with the weighted extra term behind them, and `igdm` before its weight."""
        student = Heard(nets.student, batch.x_adv)
        parts, found = self.method.loss(replace(nets, student=student), batch, state, clock)
        here = nets.student(batch.x_adv) if student.logits is None else student.logits
        away = mirrored(batch)
        teacher = fixed(nets.robust, batch.x_adv), fixed(nets.robust, away)
        gap = batch.weighted(difference_gap(teacher, (here, nets.student(away)))).mean()
        self._shape = parts.shape
        return torch.cat([parts.reshape(-1), ramp(self.alpha, clock) * gap.reshape(1)]), {**found, **terms(igdm=gap)}

    def weigh(self, parts: Tensor, state: Any) -> Tensor:
        """The method's own scalar, plus the extra term."""
        return self.method.weigh(parts[:-1].view(self._shape), state) + parts[-1]


class Heard(nn.Module):
    """A student that remembers what it said of one tensor of images, in a pass with gradient."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.net, self.training = net, net.training
        self.logits: Tensor | None = None
        self._images = images

    def forward(self, x: Tensor) -> Tensor:
        """The network's logits."""
        logits: Tensor = self.net(x)
        if x is self._images and torch.is_grad_enabled():
            self.logits = logits
        return logits
