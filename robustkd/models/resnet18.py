"""ResNet-18 in the CIFAR form of the distillation papers (methods.md, section 7).

3x3 stem without pooling, four stages of two basic blocks, global average pool, one linear layer. At width 1 it
has 11,173,962 parameters for 10 classes and 3 input channels.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models._base import ModelConfig
from robustkd.models._staged import StagedResNet


class BasicBlock(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18Config(ModelConfig, frozen=True):
    """CIFAR-style ResNet-18."""

    summary: ClassVar[str] = "CIFAR-style ResNet-18, 11.2 M parameters at width 1"
    name: Literal["resnet18"] = "resnet18"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count")
    stem_stride: int = Field(1, ge=1, le=2, description="2 quarters the cost; the papers use 1")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return StagedResNet(BasicBlock, 1, (2, 2, 2, 2), channels, classes, self.width, self.stem_stride)


ENTRY = ResNet18Config
