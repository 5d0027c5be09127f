"""Roundings with a gradient: forward exact, backward straight through.

Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013. The true
derivative of a rounding is zero almost everywhere, so an attack that follows it finds nothing and calls it robustness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustkd.engines.importer.node import Rounding


class _Quantize(torch.autograd.Function):
    """clamp(round(x / scale) + zero, low, high)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, rounding: Rounding) -> Tensor:
        level = torch.round(x / scale) + zero  # torch.round takes halves to even, as the standard does
        ctx.save_for_backward((level >= low) & (level <= high), scale)
        ctx.rounding = rounding
        return level.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale = ctx.saved_tensors
        if ctx.rounding == "exact":
            return torch.zeros_like(grad), None, None, None, None, None
        passed = grad / scale
        return (passed * inside if ctx.rounding == "masked" else passed), None, None, None, None, None


class _Straight(torch.autograd.Function):
    """A function without a useful derivative; the gradient passes as through the identity, or not at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], exact: bool) -> Tensor:
        ctx.exact = exact
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (torch.zeros_like(grad) if ctx.exact else grad), None, None


def quantize(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, rounding: Rounding) -> Tensor:
    """The levels of x as whole numbers in [low, high], of the type of x."""
    levels: Tensor = _Quantize.apply(x, scale, zero, low, high, rounding)
    return levels


def straight(x: Tensor, function: Callable[[Tensor], Tensor], rounding: Rounding) -> Tensor:
    """A step function of x with the gradient of the identity."""
    stepped: Tensor = _Straight.apply(x, function, rounding == "exact")
    return stepped


def half(x: Tensor) -> Tensor:
    """X at the resolution of half precision, in its own type.

    Half precision is computed in fp32, the result of each node rounded to half: what a device does, up to the order of its
    sums. ONNX Runtime on a CPU rounds less often. Torch's half kernels are many times slower there and no closer, and a
    gradient in half underflows where this one does not.
    """
    rounded: Tensor = _Straight.apply(x, lambda value: value.to(torch.float16).to(value.dtype), False)
    return rounded
