"""What tests of attacks that repeat the authors' code share: a network, its images, threats, and a record of what is asked."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, images, trained

THREATS = [ThreatModel(eps=0.03), ThreatModel(norm="l2", eps=0.15)]
"""Balls in which some images of `victim` fall and others do not."""


@cache
def batch(n: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    data = images(n)
    return torch.from_numpy(data.floats()), torch.from_numpy(data.labels)


@cache
def victim() -> nn.Module:
    """A network that knows the images, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return trained(Conv(), images(64), steps=200).requires_grad_(False)


class Recorder:
    """A network that writes down every image it is asked the gradient of."""

    def __init__(self, net):
        self.net, self.asked = net, []

    def __call__(self, z):
        if z.requires_grad:
            self.asked.append(z.detach().clone())
        return self.net(z)
