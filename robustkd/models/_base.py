"""The contract of the models shelf: a config that builds a network of logits over images in [0, 1]."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from robustkd.errors import ConfigError


class Normalization(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Per-channel mean and standard deviation on the [0, 1] scale, applied inside the network."""

    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _one_each(self) -> Normalization:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values, std has {len(self.std)}")
        return self


class Normalize(nn.Module):
    """(x - mean) / std as the network's own first layer, so that it is exported with it."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Normalization) -> None:
        super().__init__()
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(config.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """A network behind its normalisation; its state keys are those of the bare network."""

    def __init__(self, config: Normalization, net: nn.Module) -> None:
        super().__init__()
        self.normalize, self.net = Normalize(config), net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalize(x))
        return logits


def bare(net: nn.Module) -> nn.Module:
    """The network whose state is saved and loaded: without the normalisation in front."""
    return net.net if isinstance(net, Normalized) else net


class ModelConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What every architecture has; subclasses add their own knobs and `_net`."""

    summary: ClassVar[str] = ""
    name: str
    normalize: Normalization | None = Field(None, description="mean/std in front of the net; none by default")

    @property
    def architecture(self) -> str:
        """What a bundle says the network is."""
        return self.name

    def begin(self, net: nn.Module, *, channels: int, classes: int) -> None:
        """Give a network just built the weights its training starts from; most keep their random ones.

        Args:
            net: what `build` gave for so many `channels` and `classes`.
            channels: of the images.
            classes: number of logits.

        Raises:
            ArtifactError: weights were asked for and cannot be had.
        """

    def build(self, *, channels: int, classes: int) -> nn.Module:
        """The network: (N, channels, H, W) in [0, 1] -> logits (N, classes).

        Raises:
            ConfigError: `normalize` is for another number of channels.
        """
        if self.normalize is not None and len(self.normalize.mean) != channels:
            # broadcasting would turn grey images into colour ones, or fail inside the first convolution
            raise ConfigError(
                f"normalize has {len(self.normalize.mean)} values, the images have {channels} channels",
                fix="give one mean and one std per channel",
            )
        net = self._net(channels, classes)
        return net if self.normalize is None else Normalized(self.normalize, net)

    def _net(self, channels: int, classes: int) -> nn.Module:
        raise NotImplementedError


def check_takes(net: nn.Module, shape: tuple[int, int, int], name: str) -> None:
    """Push one black image through, as an evaluation would.

    Args:
        net: the network, on any device; its training flags stay.
        shape: C, H, W of the images.
        name: what to call it.

    Raises:
        ConfigError: it does not take images of this size.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape, device=device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"student {name} does not take images of {shape[2]}x{shape[1]} pixels: {str(error).partition(chr(10))[0]}",
            where="student",
            fix="choose another student, or resize the images (dataset.size)",
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def scaled(channels: int, width: float) -> int:
    """A channel count times the width multiplier, at least 1."""
    return max(1, round(channels * width))
