"""Pre-activation ResNet-18 in the CIFAR form of robust checkpoints.

3x3 stem, four stages of two pre-activation blocks, no norm after the last stage unless `final_norm` (the teacher of
Rice et al. 2020). A shortcut convolution takes the activated input; in some published networks (the plain block of
RobustBench) it takes the input as it is, under the same keys, so `shortcut` must say which. `pool: quarter` averages
4x4 windows instead of the whole map: at 64 px that leaves 2048 features, the form of DGAD's Tiny-ImageNet teacher,
which takes images of no other size.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016 (methods.md, section 8.1).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models._base import ModelConfig, scaled

Pool = Literal["global", "quarter"]
Shortcut = Literal["activated", "raw"]


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3, plus the shortcut; its convolution takes the activated or the raw input."""

    def __init__(self, inputs: int, outputs: int, stride: int, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(x if self.raw else active))


class PreActResNet18(nn.Module):
    """Images (N, C, H, W) to logits (N, K)."""

    def __init__(self, channels: int, classes: int, width: float, final_norm: bool, pool: Pool, shortcut: Shortcut) -> None:
        super().__init__()
        raw = shortcut == "raw"
        widths = [scaled(w, width) for w in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        inputs = widths[0]
        for stage, outputs in enumerate(widths, start=1):
            first = PreActBlock(inputs, outputs, 1 if stage == 1 else 2, raw)
            self.add_module(f"layer{stage}", nn.Sequential(first, PreActBlock(outputs, outputs, 1, raw)))
            inputs = outputs
        self.bn = nn.BatchNorm2d(inputs) if final_norm else None
        self.pool = pool
        self.linear = nn.Linear(inputs * (4 if pool == "quarter" else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in range(1, 5):
            out = getattr(self, f"layer{stage}")(out)
        if self.bn is not None:
            out = F.relu(self.bn(out))
        pooled = F.adaptive_avg_pool2d(out, 1) if self.pool == "global" else F.avg_pool2d(out, 4)
        logits: Tensor = self.linear(pooled.flatten(1))
        return logits


class PreActResNetConfig(ModelConfig, frozen=True):
    """Pre-activation ResNet-18."""

    summary: ClassVar[str] = "pre-activation ResNet-18 of robust checkpoints, 11.2 M parameters at width 1"
    name: Literal["preact-resnet"] = "preact-resnet"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count")
    final_norm: bool = Field(False, description="batch norm and ReLU after the last stage")
    pool: Pool = Field("global", description="quarter: 4x4 windows, four times the features; for 64 px only")
    shortcut: Shortcut = Field("activated", description="what a shortcut convolution takes")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return PreActResNet18(channels, classes, self.width, self.final_norm, self.pool, self.shortcut)


ENTRY = PreActResNetConfig
