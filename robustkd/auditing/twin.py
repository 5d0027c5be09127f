"""Gradients for an engine that has none: values from the engine, gradients from a differentiable twin (BPDA).

Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018: replace what cannot
be differentiated by a stand-in in the backward pass only. Here the whole engine is one such layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkd.engines._base import Engine

#: margins above which the gradient of a float32 cross entropy nears the smallest number, and those it is scaled down to
FAR, NEAR = 40.0, 10.0
#: share of the images whose margins may lie above them
MOST = 0.9


class Values(nn.Module):
    """An engine as a network of logits without gradient; counts the images it receives.

    Args:
        engine: the engine.
        probabilities: its outputs sum to one; they enter an attack as logarithms, in the same order.
    """

    def __init__(self, engine: Engine, *, probabilities: bool = False) -> None:
        super().__init__()
        self.engine, self._probabilities, self.images = engine, probabilities, 0

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K), or log-probabilities."""
        self.images += len(x)
        scores = np.array(self.engine.logits(x.detach().cpu().numpy()), dtype=np.float32, copy=True)
        logits = torch.from_numpy(scores).to(x.device)
        return logits.clamp_min(1e-30).log() if self._probabilities else logits


class Expectation(nn.Module):
    """The mean of several draws of a random network, and so of their gradients."""

    def __init__(self, net: nn.Module, draws: int) -> None:
        super().__init__()
        self.net, self.draws = net, draws

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to mean logits (N, K)."""
        mean: Tensor = torch.stack([self.net(x) for _ in range(self.draws)]).mean(0)
        return mean


@torch.no_grad()
def varies(net: nn.Module, x: Tensor) -> bool:
    """Whether two identical calls of a network differ."""
    return not torch.equal(net(x), net(x))


class Surrogate(nn.Module):
    """Forward values of `values`, vector-Jacobian product of `twin` at the same input.

    Args:
        values: the engine as a network.
        twin: a differentiable network, as a rule the checkpoint the engine was made from.
        value_scale: constant factor on the values; see `tame`.
        twin_scale: constant factor on the twin's gradient.
    """

    def __init__(self, values: nn.Module, twin: nn.Module, *, value_scale: float = 1.0, twin_scale: float = 1.0) -> None:
        super().__init__()
        self.values, self.twin = values, twin
        self.value_scale, self.twin_scale = value_scale, twin_scale

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to the engine's logits (N, K), scaled."""
        logits: Tensor = _Straight.apply(x, self)
        return logits


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        values: Tensor = surrogate.values(x)
        return values if surrogate.value_scale == 1.0 else values * surrogate.value_scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            z = x.detach().requires_grad_(True)
            logits = ctx.surrogate.twin(z)
            if not logits.requires_grad:  # a twin cut off from its input: the sanity checks will say so
                return torch.zeros_like(x), None
            (product,) = torch.autograd.grad(logits, z, grad.to(logits.dtype), allow_unused=True)
        if product is None:
            return torch.zeros_like(x), None
        return (product if ctx.surrogate.twin_scale == 1.0 else product * ctx.surrogate.twin_scale), None


class Tamed(nn.Module):
    """A network whose logits are multiplied by a constant."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to scaled logits (N, K)."""
        logits: Tensor = self.net(x) * self.scale
        return logits


@torch.no_grad()
def spread(net: nn.Module, x: Tensor) -> float:
    """The standard deviation of a network's finite logits within an image, averaged over images; 0 if there are none."""
    logits = net(x).double()
    logits = logits[logits.isfinite().all(1)]
    return float(logits.std(1).mean()) if len(logits) else 0.0


def tame(values: nn.Module, twin: nn.Module, x: Tensor) -> Surrogate:
    """The surrogate with a detached scale normalisation, so that no factor on the logits can saturate the loss.

    The engine's logits are brought to the spread of the twin's, and both to margins that saturate no loss; where
    engine and twin are the same ordinary network, nothing is scaled and the attack is the plain white-box one.
    """
    of_engine, of_twin = spread(values, x), spread(twin, x)
    if not (0 < of_engine < float("inf") and 0 < of_twin < float("inf")):
        return Surrogate(values, twin)
    slope = _factor(twin, x)
    value = slope * of_twin / of_engine
    close = abs(value - 1) < 0.01  # rounding of a faithful export is no reason to touch its values
    return Surrogate(values, twin, value_scale=1.0 if close else value, twin_scale=slope)


def tamed(net: nn.Module, x: Tensor) -> nn.Module:
    """The network itself, or its logits scaled down where cross entropy would saturate."""
    factor = _factor(net, x)
    return Tamed(net, factor) if factor < 1 else net


@torch.no_grad()
def _factor(net: nn.Module, x: Tensor) -> float:
    """1, or what brings the margins of a network that exceed `FAR` to `NEAR`, whatever its number of classes."""
    logits = net(x).double()
    top = logits[logits.isfinite().all(1)].topk(min(2, logits.shape[1]), 1).values
    reach = float((top[:, 0] - top[:, -1]).quantile(MOST)) if len(top) else 0.0
    return NEAR / reach if FAR < reach < float("inf") else 1.0
