"""AWP: each step is taken where the weights, moved a small relative distance, are worse.

Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020 (methods.md, 3.4):

    proxy = copy of S, train mode;  d = one ascent step of the proxy on L
    v = d ||w|| / (||d|| + 1e-20)    for each weight tensor of more than one dimension
    w <- w + gamma v;  gradient and optimiser step there;  w <- w - gamma v

Departures: d is the gradient itself, for the learning rate of the proxy's step cancels. L is the whole loss, other
add-ons included. With several processes the gradient is averaged first, so that all of them move alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustkd.methods._base import Terms
from robustkd.training.team import Team


def eligible(net: nn.Module) -> list[nn.Parameter]:
    """The tensors that are moved: weights of more than one dimension, so neither batch norm nor biases."""
    return [p for name, p in net.named_parameters() if "weight" in name and p.dim() > 1]


class Awp:
    """The shift of one student's weights.

    Args:
        student: the bare network; its own passes never run here, so its running statistics stay.
        gamma: length of the shift over the norm of the tensor.
        team: the processes whose gradients are averaged.
    """

    def __init__(self, student: nn.Module, *, gamma: float, team: Team) -> None:
        self.student, self.gamma, self.team = student, gamma, team
        self.proxy = copy.deepcopy(student)

    @contextmanager
    def shifted(self, loss: Callable[[nn.Module], Tensor]) -> Iterator[Terms]:
        """Inside, the student's weights are moved uphill; on leaving, the same distance back.

        Args:
            loss: of a network, to be ascended; called once, with the proxy.

        Yields:
            `awp_shift`, the norm of the whole shift.
        """
        weights = eligible(self.student)
        shifts = self._shifts(weights, loss)
        _move(weights, shifts, 1)
        try:
            yield {"awp_shift": torch.stack([shift.norm() for shift in shifts]).norm()}
        finally:
            _move(weights, shifts, -1)

    def _shifts(self, weights: list[nn.Parameter], loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
        """The shift gamma v of each of the weights."""
        self.proxy.load_state_dict(self.student.state_dict())
        self.proxy.train()
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(self.proxy), eligible(self.proxy), materialize_grads=True)
        uphill = self.team.mean({str(i): grad for i, grad in enumerate(grads)}).values()
        return [self.gamma * d * w.detach().norm() / (d.norm() + 1e-20) for d, w in zip(uphill, weights, strict=True)]


@torch.no_grad()
def _move(weights: list[nn.Parameter], shifts: list[Tensor], sign: int) -> None:
    for weight, shift in zip(weights, shifts, strict=True):
        weight.add_(shift, alpha=sign)
