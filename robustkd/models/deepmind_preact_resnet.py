"""Pre-activation ResNet-18 in DeepMind's form: Swish, 3x3 shortcut convolutions, padding right and below at stride 2.

The R18 teachers of Gowal et al. 2021, Rebuffi et al. 2021 and Rade & Moosavi-Dezfooli 2021. They normalise inside,
with constants that no checkpoint holds: give them as `normalize`, those of CIFAR-100 for CIFAR-100.

A shortcut convolution exists where the channel count or the size changes, and takes the block's input as it is,
before norm and activation. State keys: conv_2d,
layer_{0..3}.{0,1}.{batchnorm_0,conv_2d_1,batchnorm_1,conv_2d_2,shortcut}, batchnorm, logits (the counts of methods.md,
section 8.1; the names and what the shortcut takes as in RobustBench).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models._base import ModelConfig, scaled
from robustkd.models._deepmind import padded, swish


class Block(nn.Module):
    """BN-Swish-conv3x3(stride)-BN-Swish-conv3x3, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 3, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_2d_1(padded(swish(self.batchnorm_0(x)), self.stride))
        out = self.conv_2d_2(swish(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(padded(x, self.stride)))


class DeepMindPreActResNet18(nn.Module):
    """Images (N, C, H, W), already normalised, to logits (N, K)."""

    def __init__(self, channels: int, classes: int, width: float) -> None:
        super().__init__()
        widths = [scaled(w, width) for w in (64, 128, 256, 512)]
        self.conv_2d = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            first = Block(inputs, outputs, 2 if stage else 1)
            self.add_module(f"layer_{stage}", nn.Sequential(first, Block(outputs, outputs, 1)))
            inputs = outputs
        self.batchnorm = nn.BatchNorm2d(inputs)
        self.logits = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d(x)
        for stage in range(4):
            out = getattr(self, f"layer_{stage}")(out)
        out = swish(self.batchnorm(out))
        logits: Tensor = self.logits(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class DeepMindPreActResNetConfig(ModelConfig, frozen=True):
    """DeepMind-style pre-activation ResNet-18."""

    summary: ClassVar[str] = "pre-activation ResNet-18 of DeepMind's teachers (Swish), 12.5 M parameters at width 1"
    name: Literal["deepmind-preact-resnet"] = "deepmind-preact-resnet"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return DeepMindPreActResNet18(channels, classes, self.width)


ENTRY = DeepMindPreActResNetConfig
