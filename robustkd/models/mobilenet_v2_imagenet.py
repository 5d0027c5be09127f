"""MobileNetV2 with the ImageNet stem, for images of 96 pixels and more: torchvision's, with its keys.

Stride-2 stem and ReLU6, the last map 1/32 of the image. 2,236,682 parameters for 10 classes, 3 input channels and width 1.
Departure from torchvision: no dropout, as in the papers' students; the attack would otherwise search on another network
than the loss trains.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from robustkd.models._imagenet import ImagenetConfig, adopt, fetched, torchvision_models


class MobileNetV2ImagenetConfig(ImagenetConfig, frozen=True):
    """MobileNetV2 with the ImageNet stem."""

    summary: ClassVar[str] = "torchvision's MobileNetV2 for 96 px and more, 2.2 M parameters; pretrained on request"
    name: Literal["mobilenet-v2-imagenet"] = "mobilenet-v2-imagenet"
    width: float = Field(1.0, gt=0, le=8, description="multiplier of every channel count, rounded to multiples of 8")
    pretrained: bool = Field(False, description="start from torchvision's IMAGENET1K_V2, behind ImageNet's mean/std; width 1")

    @model_validator(mode="after")
    def _one_width(self) -> MobileNetV2ImagenetConfig:
        if self.pretrained and self.width != 1:
            raise ValueError("pretrained weights are of width 1")
        return self

    def begin(self, net: nn.Module, *, channels: int, classes: int) -> None:
        """Load the pretrained weights, where they are asked for."""
        if self.pretrained:
            weights = torchvision_models(self.name).MobileNet_V2_Weights.IMAGENET1K_V2
            adopt(net, fetched(weights), stem="features.0.0.weight", head="classifier.1")

    def _net(self, channels: int, classes: int) -> nn.Module:
        build = torchvision_models(self.name).mobilenet_v2
        net: Any = build(weights=None, num_classes=classes, width_mult=self.width, dropout=0.0)
        if channels != 3:
            stem = nn.Conv2d(channels, net.features[0][0].out_channels, 3, 2, 1, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out")  # as torchvision's
            net.features[0][0] = stem
        built: nn.Module = net
        return built


ENTRY = MobileNetV2ImagenetConfig
