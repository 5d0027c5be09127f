"""Wide ResNet with pre-activation blocks, in the form of the published TRADES and LTD checkpoints.

Three groups of (depth - 4) / 6 blocks, widths 16, 32 and 64 times `widen_factor`, strides 1, 2, 2, a final BN-ReLU.
Where the width changes, the shortcut convolution takes the activated input. `sub_block1` adds the copy of the first
group that the TRADES constructor makes and never runs: such checkpoints hold its weights, and loading is strict.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016 (methods.md, section 8.1).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from robustkd.models._base import ModelConfig


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        # the name is that of the published keys
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """Blocks of one width; the first one changes width and size."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = PreActBlock(inputs, outputs, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """Images (N, C, H, W) to logits (N, K)."""

    def __init__(self, channels: int, classes: int, depth: int, widen_factor: int, sub_block1: bool) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        narrow, middle, wide = (base * widen_factor for base in (16, 32, 64))
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = Group(blocks, 16, narrow, 1)
        if sub_block1:
            self.sub_block1 = Group(blocks, 16, narrow, 1)
        self.block2 = Group(blocks, narrow, middle, 2)
        self.block3 = Group(blocks, middle, wide, 2)
        self.bn1 = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer takes, (N, 64 * widen_factor)."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.adaptive_avg_pool2d(F.relu(self.bn1(out)), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


def whole_blocks(depth: int) -> int:
    """The depth, where it is one of a Wide ResNet.

    Raises:
        ValueError: it is not 6n + 4.
    """
    if (depth - 4) % 6:
        raise ValueError(f"a Wide ResNet has 6n + 4 layers (10, 16, 22, 28, 34, ...), not {depth}")
    return depth


class WideResNetConfig(ModelConfig, frozen=True):
    """Wide ResNet of 6n + 4 layers."""

    summary: ClassVar[str] = "Wide ResNet of the TRADES and LTD teachers, e.g. WRN-34-10, 46.2 M parameters"
    name: Literal["wide-resnet"] = "wide-resnet"
    depth: int = Field(34, ge=10, le=100, description="layers, 6n + 4")
    widen_factor: int = Field(10, ge=1, le=32, description="multiplier of the widths 16, 32, 64")
    sub_block1: bool = Field(False, description="hold the unused copy of the first group that TRADES checkpoints carry")

    _depth = field_validator("depth")(whole_blocks)

    def _net(self, channels: int, classes: int) -> nn.Module:
        return WideResNet(channels, classes, self.depth, self.widen_factor, self.sub_block1)


ENTRY = WideResNetConfig
