"""Wide ResNet with hypersphere embedding: features and class weights of length 1, logits their cosines.

Pang et al., "Boosting Adversarial Training with Hypersphere Embedding", NeurIPS 2020 (methods.md, section 8.2). The
body is that of `wide-resnet`; the last layer has no bias, so a checkpoint of the plain network does not load into it,
nor the other way round. Cosines lie within [-1, 1]: their softmax is nearly flat, so `scale` multiplies them where a
teacher's probabilities matter; it changes no prediction. That RobustBench's checkpoint holds `sub_block1` is how
RobustBench builds the network; methods.md does not say.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustkd.models.wide_resnet import WideResNet, WideResNetConfig


class HypersphereWideResNet(WideResNet):
    """Images (N, C, H, W) to `scale` times the cosines (N, K) between features and class weights."""

    def __init__(self, channels: int, classes: int, depth: int, widen_factor: int, sub_block1: bool, *, scale: float) -> None:
        super().__init__(channels, classes, depth, widen_factor, sub_block1)
        self.scale = scale
        self.fc = nn.Linear(self.fc.in_features, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(self.features(x)), F.normalize(self.fc.weight))
        return self.scale * cosines


class HypersphereWrnConfig(WideResNetConfig, frozen=True):
    """Wide ResNet whose logits are cosines."""

    summary: ClassVar[str] = "Wide ResNet with normalised features and weights, of Pang et al. 2020, e.g. WRN-34-20"
    name: Literal["hypersphere-wrn"] = "hypersphere-wrn"  # type: ignore[assignment]
    scale: float = Field(1.0, gt=0, description="factor of the cosines; 1 gives the published logits")

    def _net(self, channels: int, classes: int) -> nn.Module:
        return HypersphereWideResNet(channels, classes, self.depth, self.widen_factor, self.sub_block1, scale=self.scale)


ENTRY = HypersphereWrnConfig
