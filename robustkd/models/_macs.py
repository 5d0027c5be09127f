"""What a network costs: multiply-accumulates of one forward pass, counted on shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustkd.models._base import ModelConfig


def giga_macs(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> float:
    """Multiply-accumulates of one forward pass over one image, convolutions and linear layers, in 10^9.

    Args:
        config: the architecture; no weights are made.
        shape: channels, height, width of the images.
        classes: number of logits.

    Raises:
        ConfigError: the architecture does not take such images.
        RequirementError: it comes from a package that is not installed.
    """
    with torch.device("meta"):
        net = config.build(channels=shape[0], classes=classes).eval()
        total = [0]

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # each element of the output is a sum over one filter, or over one row of the matrix
            total[0] += output.numel() * module.weight[0].numel()  # type: ignore[index]

        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        net(torch.empty(1, *shape))
    return total[0] / 1e9
