"""The small CIFAR ResNets (20, 32, 44, 56, 110 layers): three stages of 16, 32 and 64 channels.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. Public checkpoints differ in
the shortcut where the shape changes: option A pads channels (behind, or half on either side), option B is a
1x1 convolution with batch norm.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models._base import ModelConfig

Shortcut = Literal["pad_end", "pad_center", "conv_shortcut"]


class Block(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.before = self.extra // 2 if shortcut == "pad_center" else 0
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if shortcut == "conv_shortcut" and (stride != 1 or self.extra):
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self._skip(x))

    def _skip(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            skipped: Tensor = self.downsample(x)
            return skipped
        if self.stride == 1 and not self.extra:
            return x
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.before, self.extra - self.before))


class CifarResNet(nn.Module):
    """Images (N, C, H, W) to logits (N, K)."""

    def __init__(self, channels: int, classes: int, depth: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(Block(inputs, outputs, 2 if stage > 1 and index == 0 else 1, shortcut))
                inputs = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 4):
            out = getattr(self, f"layer{stage}")(out)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class CifarResNetConfig(ModelConfig, frozen=True):
    """CIFAR ResNet of 6n + 2 layers."""

    summary: ClassVar[str] = "the small CIFAR ResNets (20 to 110 layers) of public checkpoints"
    name: Literal["cifar-resnet"] = "cifar-resnet"
    depth: Literal[20, 32, 44, 56, 110] = 20
    shortcut: Shortcut = Field("pad_end", description="what a shortcut does where the shape changes")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return CifarResNet(channels, classes, self.depth, self.shortcut)


ENTRY = CifarResNetConfig
