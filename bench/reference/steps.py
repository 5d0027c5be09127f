"""One training step of each method, written as scripts that accompany the papers write it.

fp32, contiguous NCHW, eager, one autograd.grad for each step of the attack, the outer passes one after the other.
Only torch is used, so that an error of robustkd cannot hide in both. Frozen teachers are the one favour done here:
the scripts leave their parameters wanting gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Setting:
    """The student with its optimiser, the frozen teacher, and the attack."""

    student: nn.Module
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    eps: float
    step_size: float
    steps: int


Step = Callable[[Setting, Tensor, Tensor, Tensor], Tensor]
"""(setting, x, y, start noise) -> the outer loss; the student has moved."""


def attack(s: Setting, objective: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
    """PGD with the student in eval mode."""
    s.student.eval()
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


def update(s: Setting, loss: Tensor) -> Tensor:
    s.optimizer.zero_grad()
    loss.backward()
    s.optimizer.step()
    return loss.detach()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="sum")


def kl_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """Over all entries, as KLDivLoss() of the scripts does; spelled out, for newer torch warns of that default."""
    return kl(student, teacher) / student.numel()


def look(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = net(x)
    return logits


def standard(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    return update(s, F.cross_entropy(s.student(x), y))


def pgd_at(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = attack(s, lambda z: F.cross_entropy(s.student(z), y, reduction="sum"), x, noise)
    loss = F.cross_entropy(s.student(x_adv), y)
    look(s.student, x)  # the scripts log clean accuracy in train mode: it moves the running statistics
    return update(s, loss)


def trades(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    # the released code looks at the clean images again in each step of the attack
    x_adv = attack(s, lambda z: kl(s.student(z), s.student(x)), x, noise)
    natural = F.cross_entropy(s.student(x), y)
    robust = kl(s.student(x_adv), s.student(x)) / len(x)
    return update(s, natural + 6.0 * robust)


def rslad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    target = look(s.teacher, x)
    x_adv = attack(s, lambda z: kl(s.student(z), target), x, noise)
    adversarial = kl_mean(s.student(x_adv), target)
    natural = kl_mean(s.student(x), target)
    return update(s, 5 / 6 * adversarial + 1 / 6 * natural)


def adaad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = attack(s, lambda z: kl(s.student(z), s.teacher(z)), x, noise)
    natural = kl_mean(s.student(x), look(s.teacher, x))
    adversarial = kl_mean(s.student(x_adv), look(s.teacher, x_adv))
    return update(s, 1.0 * adversarial + 0.0 * natural)


def dgad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = attack(s, lambda z: kl(s.student(z), s.teacher(z)), x, noise)
    clean_target, target = look(s.teacher, x), look(s.teacher, x_adv)
    wrong = clean_target.argmax(1) != y
    clean_target, target = exchange(clean_target, y), exchange(target, y)
    clean, adversarial = s.student(x), s.student(x_adv)
    standard = kl(clean[wrong], clean_target[wrong]) / len(x)
    robust = kl(adversarial[~wrong], target[~wrong]) / len(x)
    consistency = F.mse_loss(F.softmax(adversarial, dim=1), F.softmax(clean, dim=1))
    return update(s, standard + robust + 5.0 * consistency)


def exchange(logits: Tensor, y: Tensor) -> Tensor:
    """Label and largest logit change places; nothing happens where they are one."""
    swapped, row, top = logits.clone(), torch.arange(len(y)), logits.argmax(1)
    swapped[row, y] = logits[row, top]
    swapped[row, top] = logits[row, y]
    return swapped


STEPS: dict[str, Step] = {
    "standard": standard,
    "pgd-at": pgd_at,
    "trades": trades,
    "rslad": rslad,
    "adaad": adaad,
    "dgad": dgad,
}
