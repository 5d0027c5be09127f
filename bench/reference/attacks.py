"""AutoAttack's package called directly, and PGD as scripts write it: no image leaves its batch before the end."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Contiguous(torch.autograd.Function):
    """The identity; newer torch hands back gradients in other layouts, at which the package stops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The images as they are."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient, in the usual layout."""
        return grad.contiguous()


class Plain(nn.Module):
    """The network as the package can take it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        logits: Tensor = self.net(Contiguous.apply(x))
        return logits


def autoattack(
    net: nn.Module, x: Tensor, y: Tensor, *, eps: float, batch: int, steps: int, targets: int, fab: bool, queries: int
) -> Tensor:
    """The adversarial images of the standard AutoAttack (100 steps, 9 targets, FAB, 5000 queries), or of a lighter one."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    adversary = AutoAttack(Plain(net).eval(), norm="Linf", eps=eps, seed=0, version="standard", device=x.device)
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = steps
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    adversary.square.n_queries = queries
    if not fab:
        adversary.attacks_to_run = [name for name in adversary.attacks_to_run if name != "fab-t"]
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch)
    found: Tensor = x_adv
    return found


def pgd(net: nn.Module, x: Tensor, y: Tensor, *, eps: float, batch: int, steps: int) -> Tensor:
    """PGD on the cross entropy from a uniform start, step eps/4."""
    net.eval()
    rng = torch.Generator(device=x.device).manual_seed(0)
    found = []
    for clean, label in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        x_adv = clean + torch.empty_like(clean).uniform_(-eps, eps, generator=rng)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            grad = torch.autograd.grad(F.cross_entropy(net(x_adv), label), [x_adv])[0]
            x_adv = x_adv.detach() + eps / 4 * grad.sign()
            x_adv = torch.clamp(torch.min(torch.max(x_adv, clean - eps), clean + eps), 0.0, 1.0)
        found.append(x_adv.detach())
    return torch.cat(found)
