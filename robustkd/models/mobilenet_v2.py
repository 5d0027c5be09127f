"""MobileNetV2 in the CIFAR form of the distillation papers (methods.md, section 7); not the torchvision one.

ReLU instead of ReLU6, stride-1 stem, a projected shortcut on every stride-1 block whose width changes, no
dropout. At width 1 it has 2,296,922 parameters for 10 classes and 3 input channels.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models._base import ModelConfig, scaled

#: expansion, output channels, repeats, first stride
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project; a residual add wherever the stride is 1."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(wide)))))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """Images (N, C, H, W) to logits (N, K)."""

    def __init__(self, channels: int, classes: int, width: float) -> None:
        super().__init__()
        inputs, last = scaled(32, width), scaled(1280, width)
        self.conv1 = nn.Conv2d(channels, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        blocks: list[nn.Module] = []
        for expansion, size, repeats, stride in GROUPS:
            for index in range(repeats):
                outputs = scaled(size, width)
                blocks.append(InvertedResidual(inputs, outputs, expansion, stride if index == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class MobileNetV2Config(ModelConfig, frozen=True):
    """CIFAR-style MobileNetV2."""

    summary: ClassVar[str] = "CIFAR-style MobileNetV2, 2.3 M parameters at width 1"
    name: Literal["mobilenet-v2"] = "mobilenet-v2"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return MobileNetV2(channels, classes, self.width)


ENTRY = MobileNetV2Config
