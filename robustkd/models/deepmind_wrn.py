"""Wide ResNet in DeepMind's form: Swish, padding right and below at stride 2, its own key names.

The teachers of Gowal et al. 2020 and 2021, Rebuffi et al. 2021, Rade & Moosavi-Dezfooli 2021, Pang et al. 2022,
Wang et al. 2023, Cui et al. 2023 and Bartoldson et al. 2024: 28-10, 34-10, 34-20, 70-16, 82-8 and 94-16. They
normalise inside, with constants that no checkpoint holds: give them as `normalize`, those of CIFAR-100 for CIFAR-100.

A shortcut convolution exists where the channel count changes, and takes the activated input. State keys: init_conv,
layer.{0,1,2}.block.*.{batchnorm_0,conv_0,batchnorm_1,conv_1,shortcut}, batchnorm, logits (methods.md, section 8.2;
the names within a block as in RobustBench).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from robustkd.models._base import ModelConfig
from robustkd.models._deepmind import padded, swish
from robustkd.models.wide_resnet import whole_blocks


class Block(nn.Module):
    """BN-Swish-conv3x3(stride)-BN-Swish-conv3x3, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = swish(self.batchnorm_0(x))
        out: Tensor = self.conv_0(padded(active, self.stride))
        out = self.conv_1(swish(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(active))


class Group(nn.Module):
    """Blocks of one width; the first one changes width and size."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = Block(inputs, outputs, stride)
        self.block = nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class DeepMindWideResNet(nn.Module):
    """Images (N, C, H, W), already normalised, to logits (N, K)."""

    def __init__(self, channels: int, classes: int, depth: int, widen_factor: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        narrow, middle, wide = (base * widen_factor for base in (16, 32, 64))
        self.init_conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer = nn.Sequential(
            Group(blocks, 16, narrow, 1), Group(blocks, narrow, middle, 2), Group(blocks, middle, wide, 2)
        )
        self.batchnorm = nn.BatchNorm2d(wide)
        self.logits = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = swish(self.batchnorm(self.layer(self.init_conv(x))))
        logits: Tensor = self.logits(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class DeepMindWrnConfig(ModelConfig, frozen=True):
    """DeepMind-style Wide ResNet of 6n + 4 layers."""

    summary: ClassVar[str] = "Wide ResNet of DeepMind's teachers (Swish), e.g. WRN-28-10, 36.5 M parameters"
    name: Literal["deepmind-wrn"] = "deepmind-wrn"
    depth: int = Field(28, ge=10, le=106, description="layers, 6n + 4")
    widen_factor: int = Field(10, ge=1, le=32, description="multiplier of the widths 16, 32, 64")

    _depth = field_validator("depth")(whole_blocks)

    def _net(self, channels: int, classes: int) -> nn.Module:
        return DeepMindWideResNet(channels, classes, self.depth, self.widen_factor)


ENTRY = DeepMindWrnConfig
