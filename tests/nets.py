"""Networks and batches small enough that a test can say what every one of their numbers is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustkd.catalog import Shelf
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Terms

CLOCK = Clock(epoch=0, epochs=1, step=0)


def make(name: str, *, classes: int = 10, **knobs: Any) -> Method[Any, Any]:
    """A method of the shelf with its default knobs, and those given."""
    entry: type[Method[MethodConfig, Any]] = Shelf("methods").get(name)
    return entry(entry.Config(**{"name": name, **knobs}), classes=classes)


def outer(
    method: Method[Any, Any], nets: Nets, batch: Batch, state: Any = None, clock: Clock = CLOCK
) -> tuple[Tensor, Terms, Any]:
    """One outer step as the loop takes it: the scalar to differentiate, the terms, and the state after it."""
    state = method.init() if state is None else state
    parts, found = method.loss(nets, batch, state, clock)
    state = method.advance(state, {"loss": parts.detach(), **found}, clock)
    return method.weigh(parts, state), found, state


class Reader(nn.Module):
    """A network whose logits are written in the image: channels [first, first + classes) of a 1x1 picture."""

    def __init__(self, first: int, classes: int) -> None:
        super().__init__()
        self.channels = slice(first, first + classes)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.channels, 0, 0]


def readers(classes: int) -> Nets:
    """Student and teacher that read their logits off the image, the student's first."""
    return Nets(Reader(0, classes), {"robust": Reader(classes, classes), "clean": Reader(classes, classes)})


def picture(student: Any, teacher: Any) -> Tensor:
    """The image on which `readers` give these logits, float64, (N, 2C, 1, 1)."""
    logits = torch.cat([torch.as_tensor(student), torch.as_tensor(teacher)], dim=1)
    return logits.double()[:, :, None, None]


class SmallNet(nn.Module):
    """conv - batch norm - ReLU - pool - linear; records what each pass was given and how."""

    def __init__(self, classes: int = 10, *, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(channels, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.linear = nn.Linear(6, classes)
            nn.init.normal_(self.linear.weight, std=2.0)
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        self.modes.append(self.training)
        logits: Tensor = self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))
        return logits


def frozen(net: nn.Module) -> nn.Module:
    """A teacher as training hands it to a method: eval mode, parameters that want no gradient."""
    return net.eval().requires_grad_(False)


def images(rows: int = 6, *, channels: int = 3, size: int = 8, seed: int = 1) -> Tensor:
    """Random pictures in [0, 1]."""
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 6, *, classes: int = 10, seed: int = 2) -> Tensor:
    """Random labels."""
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
