"""A teacher is asked for the same images by the attack, the outer loss and add-ons; it need run once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkd.methods._base import Nets, Role, fixed


class Memo(nn.Module):
    """A frozen teacher that runs once on each tensor of images within a step, however many ask."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.training = net, net.training
        self._known: list[tuple[Tensor, bool, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """The teacher's logits, from memory where these very images were asked for."""
        if x.requires_grad and torch.is_grad_enabled():
            return self.net(x)  # type: ignore[no-any-return]  # somebody wants a gradient through it
        autocast = torch.is_autocast_enabled(x.device.type)  # another precision is another answer
        for images, precision, logits in self._known:
            if images is x and precision == autocast:
                return logits
        logits = fixed(self.net, x)
        self._known.append((x, autocast, logits))
        return logits


def remembering(student: nn.Module, teachers: dict[Role, nn.Module]) -> Nets:
    """The nets of one step; make new ones for the next."""
    return Nets(student, {role: Memo(net) for role, net in teachers.items()})
