"""ResNet-18 with the ImageNet stem, for images of 96 pixels and more: torchvision's, with its keys.

7x7 stem of stride 2, max pooling, four stages of two basic blocks: the last map is 1/32 of the image. 11,181,642 parameters
for 10 classes and 3 input channels.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from robustkd.models._imagenet import ImagenetConfig, adopt, fetched, torchvision_models


class ResNet18ImagenetConfig(ImagenetConfig, frozen=True):
    """ResNet-18 with the ImageNet stem."""

    summary: ClassVar[str] = "torchvision's ResNet-18 for 96 px and more, 11.2 M parameters; pretrained on request"
    name: Literal["resnet18-imagenet"] = "resnet18-imagenet"
    pretrained: bool = Field(False, description="start from torchvision's IMAGENET1K_V1, behind ImageNet's mean/std")

    def begin(self, net: nn.Module, *, channels: int, classes: int) -> None:
        """Load the pretrained weights, where they are asked for."""
        if self.pretrained:
            weights = torchvision_models(self.name).ResNet18_Weights.IMAGENET1K_V1
            adopt(net, fetched(weights), stem="conv1.weight", head="fc")

    def _net(self, channels: int, classes: int) -> nn.Module:
        net: nn.Module = torchvision_models(self.name).resnet18(weights=None, num_classes=classes)
        if channels != 3:
            net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        return net


ENTRY = ResNet18ImagenetConfig
