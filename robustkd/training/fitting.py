"""Whether a teacher fits the data: channels, classes and their order, image size. Asked before its weights are read."""

from __future__ import annotations

import torch
from torch import nn

from robustkd.errors import ConfigError
from robustkd.models._base import ModelConfig

Shape = tuple[int, int, int]
"""Channels, height, width; a height of 0 is not known."""


def needs_model(source: str, model: ModelConfig | None) -> ModelConfig:
    """The architecture of a file, which must be given.

    Raises:
        ConfigError: it is not.
    """
    if model is None:
        raise ConfigError(
            "a teacher file needs its architecture",
            where=source,
            fix="add teachers[].model: {name: resnet18}",
        )
    return model


def fits(name: str, has: Shape, has_classes: int, wanted: Shape, classes: int) -> None:
    """Compare channels, classes and, where both are known, the size of the images.

    Raises:
        ConfigError: one of them differs.
    """
    if (has[0], has_classes) != (wanted[0], classes):
        raise ConfigError(
            f"teacher {name} is for {has[0]} channels and {has_classes} classes, the data has {wanted[0]} and {classes}",
            fix="choose a teacher of this data set",
        )
    if has[1] and wanted[1] and has[1:] != wanted[1:]:
        raise ConfigError(
            f"teacher {name} is for images of {has[1]}x{has[2]} pixels, the data has {wanted[1]}x{wanted[2]}",
            fix="choose a teacher of this data set",
        )


def same_order(name: str, has: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """The same classes in another order would teach every image a wrong label; other names may be other words for them."""
    if has != wanted and sorted(has) == sorted(wanted):
        first = next(i for i, (a, b) in enumerate(zip(has, wanted, strict=True)) if a != b)
        raise ConfigError(
            f"teacher {name} has the classes of the data in another order: class {first} is {has[first]}, not {wanted[first]}",
            fix="give the data's classes in the teacher's order, or choose another teacher",
        )


def takes(name: str, model: ModelConfig, shape: Shape, classes: int) -> None:
    """Push one image without content through the architecture, on a device that computes shapes only."""
    if not shape[1]:
        return
    with torch.device("meta"):
        net = model.build(channels=shape[0], classes=classes).eval()
    tried(name, net, shape, torch.device("meta"))


def tried(name: str, net: nn.Module, shape: Shape, device: torch.device) -> None:
    """Push one black image through a network.

    Raises:
        ConfigError: it does not take images of this size.
    """
    if not shape[1]:
        return
    try:
        with torch.no_grad():
            net(torch.zeros(1, *shape, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:  # libraries assert sizes
        raise ConfigError(
            f"teacher {name} does not take images of {shape[1]}x{shape[2]} pixels",
            fix="choose a teacher of this data set",
        ) from error
