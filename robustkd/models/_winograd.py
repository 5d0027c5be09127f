"""Frozen 3x3 convolutions of many channels, on a CPU, with a quarter of the multiplications: Winograd's F(4x4, 3x3).

Each tile of 4x4 outputs is interpolated from its values at 6x6 points instead of being summed tap by tap: Y = A'[(G g G')
(B' d B)]A (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016). The points are 0, infinity and
+-sqrt(2), +-1/sqrt(2) and not the usual 0, +-1, +-2: reciprocal pairs keep the matrices small. In float32 the answers are then
rounded like those of the plain convolution with channels last, 3 to 6e-7 of their norm, and gradients twice as much (held to
in tests/unit/test_winograd.py). The products over channels are 36 plain matrix products, left to oneDNN as one grouped 1x1
convolution; the transforms are sums of strided views.

The gradient to the images is the same kind of convolution, with the weights turned and transposed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE, TAPS = 4, 3
POINTS = TILE + TAPS - 1
CHANNELS = 160
"""Fewest channels, in and out, at which the products outweigh the transforms."""
WORK = 2 * 10**9
"""Fewest multiplications of the plain convolution, per batch, that are worth the memory of transformed weights."""
CHUNK = 3 * 2**20
"""Bytes of transformed images at a time: they are to stay in a cache."""
SOME = 2**13
"""Weights transformed at a time."""
P, Q = 2**0.5, 0.5**0.5
SUM = P * P + Q * Q


def _matrices() -> tuple[Any, Any]:
    """G (6, 3) that goes with `_spread` and `_gather`, and c (6,) that `_gather` turns into ones."""
    points = np.array([0.0, P, -P, Q, -Q])
    scale = np.array([1.0, P, P, Q, Q])
    norms = [np.prod([p - o for o in points if o != p]) for p in points]
    taps = np.array([[s * p**j / n for j in range(TAPS)] for p, n, s in zip(points, norms, scale, strict=True)])
    gather = np.array([[p**j / s for j in range(TILE)] for p, s in zip(points, scale, strict=True)])
    gather = np.vstack([gather, [0.0] * (TILE - 1) + [1.0]]).T
    return np.vstack([taps, [0.0, 0.0, 1.0]]), np.linalg.lstsq(gather, np.ones(TILE), rcond=None)[0]


def _spread(d: Sequence[Tensor], out: Sequence[Tensor], axis: int) -> None:
    """B'd along one axis of tiles: the four rows of each tile, and the last and first of its neighbours, to six values."""
    for plus, minus, p, q in ((out[1], out[2], P, Q), (out[3], out[4], Q, P)):
        torch.sub(d[3], d[1], alpha=q * q, out=plus)
        torch.sub(d[2], d[0], alpha=q * q, out=minus)
        plus.add_(minus, alpha=p)
        torch.sub(plus, minus, alpha=2 * p, out=minus)
    rest = d[0].shape[axis] - 1
    torch.sub(d[3], d[1], alpha=SUM, out=out[0]).narrow(axis, 1, rest).add_(d[3].narrow(axis, 0, rest))
    torch.sub(d[0], d[2], alpha=SUM, out=out[5]).narrow(axis, 0, rest).add_(d[0].narrow(axis, 1, rest))


def _gather(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """A'm along one axis: six values, which it uses up, to four sums."""
    for plus, minus in ((m[1], m[2]), (m[3], m[4])):
        plus.add_(minus)
        torch.sub(plus, minus, alpha=2, out=minus)
    torch.add(m[0], m[1], alpha=Q, out=out[0]).add_(m[3], alpha=P)
    torch.add(m[2], m[4], out=out[1])
    torch.add(m[1], m[3], alpha=0.5, out=out[2]).mul_(P)
    torch.add(m[5], m[2], alpha=P * P, out=out[3]).add_(m[4], alpha=Q * Q)


class _Room(threading.local):
    """Memory of the transforms, kept between calls: asking the system for it anew costs as much as filling it."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of whatever was in it."""
        need = int(np.prod(shape))
        flat = self._flat.get((name, like.dtype))
        if flat is None or flat.numel() < need:
            with torch.inference_mode(False):  # it is written to again outside of it
                flat = self._flat[name, like.dtype] = torch.zeros(need, dtype=like.dtype, device=like.device)
        return flat[:need].view(shape)


ROOM = _Room()
LAYING = threading.Lock()
ONCE = ([0, 0], [1, 1], [1, 1])
"""Padding, stride and dilation of a matrix product as a convolution."""


class _Direction:
    """One convolution, or with its weights `turned` and transposed the way back: (O, C, 3, 3), transformed once.

    However many images are asked about, products are taken of the same number of rows at a time: oneDNN wants the weights
    laid out for it, and an image's answer does not depend on the company it is in.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, turned: bool = False) -> None:
        taps, ones = (torch.tensor(m, dtype=torch.float64) for m in _matrices())
        self._taps = taps.flip(1) if turned else taps
        self._plain = weight.transpose(0, 1) if turned else weight  # a view: turning is left to the taps
        self.outputs, self.inputs = self._plain.shape[:2]
        self._bias = None
        if bias is not None:
            self._bias = torch.einsum("i,j,o->ijo", ones, ones, bias.double()).to(bias.dtype).flatten()
        self._laid: tuple[int, Tensor] = 0, weight

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W), channels last."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % TILE, 0, -height % TILE)).permute(0, 2, 3, 1).contiguous()
        n, down, across = len(x), x.shape[1] // TILE, x.shape[2] // TILE
        step = max(1, CHUNK // (down * across * POINTS**2 * self.inputs * x.element_size()))
        self._lay(step * down * across)
        shape = n, self.outputs, down * TILE, across * TILE
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        tiles = y.permute(0, 2, 3, 1).view(n, down, TILE, across, TILE, self.outputs)
        for first in range(0, n, step):
            self._some(x[first : first + step], tiles[first : first + step])
        if (height, width) == y.shape[2:]:
            return y  # itself and no view: what follows may then work in place
        return y[:, :, :height, :width].clone(memory_format=torch.channels_last)

    def _some(self, x: Tensor, y: Tensor) -> None:
        n, down, _, across, _, _ = y.shape
        mixed = ROOM.take("mixed", x, n, down, POINTS, across * TILE * self.inputs)
        _spread(x.view(n, down, TILE, -1).unbind(2), mixed.unbind(2), 1)
        columns = mixed.view(n, down, POINTS, across, TILE, self.inputs)
        room = ROOM.take("spread", x, self._laid[0], POINTS**2 * self.inputs)
        spread = room[: n * down * across].view(n, down, across, POINTS, POINTS, self.inputs)
        _spread(columns.unbind(4), spread.transpose(2, 3).unbind(4), 3)
        products = self._products(room)[: n * down * across].view(n, down, across, POINTS, -1).unbind(3)
        half = ROOM.take("half", x, n, down, TILE, across, POINTS, self.outputs)
        _gather(products, half.flatten(4).unbind(2))
        _gather(half.unbind(4), y.unbind(4))

    def _products(self, rows: Tensor) -> Tensor:
        """(T, 36 C) -> (T, 36 O)."""
        image, weight = rows.t()[None, :, None, :], self._laid[1]  # (1, 36 C, 1, T)
        if not weight.is_mkldnn:
            return F.conv2d(image, weight, self._bias, groups=POINTS**2)[0, :, 0].t().contiguous()
        convolve = torch.ops.mkldnn._convolution_pointwise
        found: Tensor = convolve(image, weight, self._bias, *ONCE, POINTS**2, "none", [], "")
        return found[0, :, 0].t()

    def _lay(self, rows: int) -> None:
        """Have the weights ready for products of so many rows, or more."""
        with LAYING, torch.inference_mode(False), torch.no_grad():
            if rows <= self._laid[0]:
                return
            self._laid = rows, self._packed(rows)

    def _packed(self, rows: int) -> Tensor:
        """The products' weights, (36 O, C, 1, 1): G g G' in float64, then rounded."""
        taps = torch.kron(self._taps, self._taps)  # (36, 9)
        plain = self._plain.permute(2, 3, 0, 1).reshape(TAPS**2, -1)
        wide = plain.new_empty(len(taps), plain.shape[1])
        for first in range(0, plain.shape[1], SOME):
            some = slice(first, first + SOME)
            wide[:, some] = taps @ plain[:, some].double()
        weight = wide.view(-1, self.inputs, 1, 1)
        if not PACKS or weight.dtype != torch.float32:
            return weight
        image = [1, len(taps) * self.inputs, 1, rows]
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *ONCE, len(taps), image)
        return packed


def _packs() -> bool:
    """Whether this torch lays weights out for oneDNN once; without, it does so in every call."""
    needed = "_reorder_convolution_weight", "_convolution_pointwise"
    return all(hasattr(torch.ops.mkldnn, name) for name in needed)


PACKS = _packs()


class _Convolve(torch.autograd.Function):
    """The convolution, differentiable with respect to the images once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: Winograd) -> Tensor:
        ctx.conv = conv
        return conv.ahead(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.conv.back(grad), None


class Winograd(nn.Module):
    """A convolution of 3x3 taps, stride 1 and one zero around, whose weights no longer move.

    Args:
        weight: (O, C, 3, 3).
        bias: (O,) or none.
        images: how many are usually asked about at a time. What is done does not depend on how many it is in the end.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, images: int) -> None:
        super().__init__()
        self._images = images
        self._plain = (weight.detach(), None if bias is None else bias.detach())  # a tuple: neither buffers nor parameters
        self._ahead: _Direction | None = None
        self._back: _Direction | None = None

    @torch.no_grad()
    def ahead(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        if self._ahead is None:
            self._ahead = _Direction(*self._plain)
        return self._ahead(x)

    @torch.no_grad()
    def back(self, grad: Tensor) -> Tensor:
        """(N, O, H, W) -> (N, C, H, W)."""
        if self._back is None:
            self._back = _Direction(self._plain[0], None, turned=True)
        return self._back(grad)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        weight, bias = self._plain
        small = self._images * weight.numel() * x.shape[2] * x.shape[3] < WORK
        if small or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.conv2d(x, weight, bias, padding=1)
        found: Tensor = _Convolve.apply(x, self)
        return found


def within(net: nn.Module) -> bool:
    """Whether a network has such a layer."""
    return any(isinstance(module, Winograd) for module in net.modules())


def suits(conv: nn.Conv2d, weight: Tensor) -> bool:
    """Whether a convolution can be had this way, and is likely to be quicker."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and min(weight.shape[:2]) >= CHANNELS
        and weight.shape[2:] == (TAPS, TAPS)
        and (conv.stride, conv.padding, conv.dilation, conv.groups) == ((1, 1), (1, 1), (1, 1), 1)
        and conv.padding_mode == "zeros"
    )
