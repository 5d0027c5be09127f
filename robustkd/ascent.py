"""The one projected-gradient loop, shared by training and by attacks (methods.md, section 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from robustkd.threat import Start, ThreatModel

Objective = Callable[[Tensor], Tensor]
"""What an inner problem maximises: x_adv (N, C, H, W) -> (N,)."""

BatchNormMode = Literal["eval", "train"]


def ascend(
    objective: Objective,
    x: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    start: Start | Tensor = "noise",
    rng: Generator | None = None,
) -> Tensor:
    """Maximise `objective` over the ball around `x` by projected steepest ascent.

    Only the gradient with respect to x_adv is taken, so no parameter gradient is built or accumulated.

    Args:
        objective: x_adv (N, C, H, W) -> (N,); its batch sum is differentiated.
        x: clean images in [0, 1].
        threat: the ball; each iterate is projected into it, then into [0, 1].
        steps: number of steps; 0 returns the projected start.
        step_size: length of one step on the [0, 1] pixel scale.
        start: `noise`, `uniform` or `zero`, or the first points themselves.
        rng: source of the start's randomness.

    Returns:
        x_adv, detached, of the shape of `x`.
    """
    x_adv = start if isinstance(start, Tensor) else threat.start(x, start, rng)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        with torch.enable_grad():
            value = objective(x_adv).sum()
            (grad,) = torch.autograd.grad(value, x_adv)
        x_adv = threat.project(x_adv.detach() + step_size * threat.step(grad), x)
    return x_adv.detach() if steps else threat.project(x_adv, x).detach()


@contextmanager
def attacking(net: nn.Module, mode: BatchNormMode = "eval") -> Iterator[nn.Module]:
    """Put `net` into the mode its method attacks in, and give each layer its own flag back afterwards."""
    before = [(module, module.training) for module in net.modules()]
    net.train(mode == "train")
    try:
        yield net
    finally:
        for module, training in before:
            module.training = training
