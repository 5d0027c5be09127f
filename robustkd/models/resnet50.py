"""ResNet-50 in the CIFAR form: stages of 3, 4, 6 and 3 bottlenecks; 23,520,842 parameters for 10 classes.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the stride is that of the 3x3 convolution.
State keys are those of the common CIFAR ResNets (and of RobustBench): conv1, bn1,
layer1-4.*.{conv1-3,bn1-3,shortcut.0,shortcut.1}, linear.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models._base import ModelConfig
from robustkd.models._staged import StagedResNet

#: channels that leave a bottleneck, per plane
EXPANSION = 4


class Bottleneck(nn.Module):
    """conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN, plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + self.shortcut(x))


class ResNet50Config(ModelConfig, frozen=True):
    """CIFAR-style ResNet-50."""

    summary: ClassVar[str] = "CIFAR-style ResNet-50, 23.5 M parameters at width 1"
    name: Literal["resnet50"] = "resnet50"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return StagedResNet(Bottleneck, EXPANSION, (3, 4, 6, 3), channels, classes, self.width)


ENTRY = ResNet50Config
