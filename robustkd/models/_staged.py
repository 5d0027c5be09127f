"""The four-stage CIFAR ResNet that ResNet-18, -34 and -50 share: 3x3 stem, no pooling in front."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from robustkd.models._base import scaled

#: (input channels, planes, stride) -> a block of planes times expansion channels
Block = Callable[[int, int, int], nn.Module]


class StagedResNet(nn.Module):
    """Images (N, C, H, W) to logits (N, K); planes 64, 128, 256, 512 times `width`, strides 1, 2, 2, 2.

    Args:
        block: makes one residual block.
        expansion: channels that leave a block per plane: 1, or 4 of a bottleneck.
        repeats: blocks of each stage.
        channels: of the images.
        classes: number of logits.
        width: multiplier of every channel count.
        stem_stride: of the first convolution.
    """

    def __init__(
        self,
        block: Block,
        expansion: int,
        repeats: tuple[int, int, int, int],
        channels: int,
        classes: int,
        width: float,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        inputs = scaled(64, width)
        self.conv1 = nn.Conv2d(channels, inputs, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        for stage, (base, number) in enumerate(zip((64, 128, 256, 512), repeats, strict=True), start=1):
            planes, blocks = scaled(base, width), []
            for index in range(number):
                blocks.append(block(inputs, planes, 2 if stage > 1 and index == 0 else 1))
                inputs = planes * expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            out = getattr(self, f"layer{stage}")(out)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
