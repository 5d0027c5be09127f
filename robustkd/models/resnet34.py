"""ResNet-34 in the CIFAR form: stages of 3, 4, 6 and 3 basic blocks; 21,282,122 parameters for 10 classes.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. State keys are those of the common CIFAR
ResNets (and of RobustBench): conv1, bn1, layer1-4.*.{conv1,bn1,conv2,bn2,shortcut.0,shortcut.1}, linear.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from robustkd.models._base import ModelConfig
from robustkd.models._staged import StagedResNet
from robustkd.models.resnet18 import BasicBlock


class ResNet34Config(ModelConfig, frozen=True):
    """CIFAR-style ResNet-34."""

    summary: ClassVar[str] = "CIFAR-style ResNet-34, 21.3 M parameters at width 1"
    name: Literal["resnet34"] = "resnet34"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return StagedResNet(BasicBlock, 1, (3, 4, 6, 3), channels, classes, self.width)


ENTRY = ResNet34Config
