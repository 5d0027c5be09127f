"""What the reference steps share: the attack, the update, the divergences.

fp32, contiguous NCHW, eager, one autograd.grad for each step of the attack. Only torch is used, so that an error of
robustkd cannot hide in both. Frozen teachers are the one favour done here: the scripts leave their parameters wanting
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Setting:
    """The student with its optimiser, the frozen teachers, the attack, and what a method remembers between steps.

    Attributes:
        teacher: the robust teacher, or the only one.
        clean: the clean teacher of the methods with two.
        memory: numbers by name, empty before the first step.
    """

    student: nn.Module
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    eps: float
    step_size: float
    steps: int
    clean: nn.Module | None = None
    memory: dict[str, float] = field(default_factory=dict)


Step = Callable[[Setting, Tensor, Tensor, Tensor], Tensor]
"""(setting, x, y, what the attack adds to x at its start) -> the outer loss; the student has moved."""


def attack(s: Setting, objective: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor, *, training: bool = False) -> Tensor:
    """PGD with the student in eval mode, or in the train mode of ARD and IAD."""
    s.student.train(training)
    x_adv = x.detach() + noise
    for _ in range(s.steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = objective(x_adv)
        grad = torch.autograd.grad(loss, [x_adv])[0]
        x_adv = x_adv.detach() + s.step_size * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - s.eps), x + s.eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    s.student.train()
    return x_adv.detach()


def on_labels(s: Setting, x: Tensor, y: Tensor, noise: Tensor, *, training: bool = False) -> Tensor:
    """The attack on the cross entropy, which half of the methods share."""
    return attack(s, lambda z: F.cross_entropy(s.student(z), y, reduction="sum"), x, noise, training=training)


def update(s: Setting, loss: Tensor) -> Tensor:
    s.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    s.optimizer.step()
    return loss.detach()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="sum")


def kl_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """Over all entries, as KLDivLoss() of the scripts does; spelled out, for newer torch warns of that default."""
    return kl(student, teacher) / student.numel()


def kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """For each image."""
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="none").sum(dim=1)


def look(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = net(x)
    return logits
