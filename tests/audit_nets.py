"""Tiny nets, engines and images for the tests of attacks and audits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from robustkd.datasets._base import ImageSet
from robustkd.engines._base import EngineInfo


def linear(classes: int, shape=(1, 4, 4), seed: int = 0) -> nn.Module:
    """z = W x + b in float32, with a robust radius known in closed form."""
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(int(np.prod(shape)), classes)
    with torch.no_grad():
        layer.weight.normal_(generator=rng)
        layer.bias.copy_(-layer.weight.sum(1) * 0.5)  # mid-grey lies on every boundary
    return nn.Sequential(nn.Flatten(), layer)


def radius(net: nn.Module, x: Tensor) -> Tensor:
    """The Linf radius at which the answer of a linear net changes, ignoring the box: min (z_y - z_t) / |w_y - w_t|_1."""
    layer = net[1]
    z = net(x).double()
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z
    norms = (layer.weight[y][:, None] - layer.weight[None]).abs().sum(-1).double()
    ratio = torch.where(norms > 0, gaps / norms.clamp_min(1e-12), torch.full_like(gaps, torch.inf))
    return ratio.min(1).values


class Conv(nn.Module):
    """Two convolutions and a head, with batch norm; the same weights whatever ran before."""

    def __init__(self, classes: int = 4, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU()
            )
            self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def images(n: int = 64, classes: int = 4, *, noise: float = 0.15, seed: int = 0, size: int = 8) -> ImageSet:
    """Classes are bright quadrants of different size on a noisy ground; uint8."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = 0.4 + noise * rng.standard_normal((n, 1, size, size))
    half = size // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half)]
    for i, label in enumerate(y):
        top, left = corners[label % 4]
        x[i, 0, top : top + half, left : left + half] += 0.12 + 0.03 * rng.random()
    pixels = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return ImageSet(pixels, y.astype(np.int64), tuple(f"c{i}" for i in range(classes)), "quadrants", "test")


class Quadrants(nn.Module):
    """Mean brightness of each quadrant times a gain: an honest net with known weights."""

    def __init__(self, classes: int = 4, gain: float = 60.0) -> None:
        super().__init__()
        self.gain, self.classes = nn.Parameter(torch.tensor(gain)), classes

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        parts = [x[..., i : i + half, j : j + half].mean((1, 2, 3)) for i in (0, half) for j in (0, half)]
        smooth = torch.stack(parts, 1)[:, : self.classes]
        return self.gain * smooth + 2.0 * torch.tanh(8 * smooth)


class TorchEngine:
    """A torch net behind the engine contract; `answer` may cheat."""

    def __init__(self, net: nn.Module, shape=(1, 8, 8), classes: int = 4, answer=None) -> None:
        self.net, self.answer, self.images = net.eval(), answer or (lambda net, x: net(x)), 0
        self.info = EngineInfo(
            runtime="fake", runtime_version="1", precision="fp32", device="cpu", input_shape=shape, classes=classes
        )

    @torch.no_grad()
    def logits(self, x):
        self.images += len(x)
        if not len(x):
            return np.zeros((0, self.info.classes), np.float32)
        return self.answer(self.net, torch.from_numpy(np.array(x))).float().numpy().copy()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        return None


def trained(net: nn.Module, data: ImageSet, steps: int = 60) -> nn.Module:
    """A few full-batch steps, enough to be right on most images."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net.eval()
