"""Teachers: a card on the shelf or the user's own file; digest checked, strictly loaded, frozen, in eval mode.

The weights of most cards do not ship: they are looked for in ROBUSTKD_TEACHERS, then in `teachers` under the data root.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from robustkd.bundle import Bundle, sha256
from robustkd.errors import ArtifactError, ConfigError, nearest
from robustkd.methods._base import Role
from robustkd.models._base import ModelConfig
from robustkd.models._files import load_net, load_state
from robustkd.models._foreign import read_foreign
from robustkd.recipe.reading import Key, read_yaml, validate
from robustkd.recipe.schema import AnyModel, Recipe, TeacherConfig
from robustkd.threat import ThreatModel

FOLDER = Path(__file__).parent.parent / "teachers"
Shape = tuple[int, int, int]


class Card(BaseModel, frozen=True, extra="forbid"):
    """What is known of a teacher: one YAML file of `robustkd/teachers/`."""

    name: str
    summary: str
    model: AnyModel
    channels: int
    classes: int
    size: int | None = Field(None, description="height and width of its images, in pixels")
    file: str = Field(description="beside the card, or under a folder of teachers; a .safetensors of this name also does")
    sha256: str | None = Field(None, description="digest of exactly this file")
    prefix: str = Field("", description="what every key of the file begins with, beside `module.` and `model.`")
    rename: dict[str, str] = Field({}, description="first parts of keys that the file calls otherwise")
    dataset: str
    threat: ThreatModel | None = Field(None, description="none: a clean teacher")
    published: str = Field("", description="where the file comes from; empty where it ships")
    paper: str = ""
    reported: dict[str, Any] = Field({}, description="accuracies as published, fractions; not measured here")
    measured: dict[str, Any] = Field({}, description="accuracies measured here, fractions")
    recipe: str | None = Field(None, description="the shipped recipe that trains it")
    licence: str


def cards() -> dict[str, Path]:
    """Every teacher card by name."""
    return {f.stem: f for f in sorted(FOLDER.glob("*.yaml"))}


def read_card(name: str) -> Card:
    """One teacher card.

    Raises:
        ConfigError: there is no card of this name.
    """
    if name not in cards():
        raise ConfigError(f"there is no teacher {name}", fix=nearest(name, cards()) or "give path and model instead")
    return validate(Card, read_yaml(cards()[name]))


def check_teachers(recipe: Recipe, where: Callable[[Key], str]) -> None:
    """Whether the cards of a recipe exist and suit its data, as far as that is known before a file is read.

    Args:
        recipe: the resolved recipe.
        where: from a key of the recipe to its file and line.

    Raises:
        ConfigError: a card does not exist, or is for another number of classes or channels, or another image size.
    """
    for index, config in enumerate(recipe.teachers):
        if config.id is None:
            continue
        try:
            card = read_card(config.id)
            if (facts := recipe.dataset.facts) is not None:
                _card_fits(card, facts.shape, facts.classes)
        except ConfigError as error:
            raise ConfigError(error.what, where=where(("teachers", index, "id")), fix=error.fix) from error


def load_teachers(
    configs: tuple[TeacherConfig, ...],
    *,
    channels: int,
    classes: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    root: Path | None = None,
) -> tuple[dict[Role, nn.Module], list[dict[str, str]]]:
    """The teachers by role, and for the manifest where each came from with its digest.

    Args:
        configs: the recipe's teachers.
        channels: of the images.
        classes: of the data.
        device: where the teachers go.
        size: height and width of the images, in pixels; left out, it is not checked.
        root: the data root, whose `teachers` may hold the weights; left out, ROBUSTKD_DATA, then ./data.

    Raises:
        ArtifactError: a file is missing, is not the one described, or does not fit its architecture.
        ConfigError: a teacher has another number of classes or channels than the data, or takes images of another size.
    """
    nets: dict[Role, nn.Module] = {}
    origins = []
    for index, config in enumerate(configs):
        try:
            net, file = _load(config, (channels, *(size or (0, 0))), classes, root)
        except ConfigError as error:
            raise ConfigError(error.what, where=error.where or f"teachers[{index}]", fix=error.fix) from error
        nets[config.role] = freeze(net).to(device).to(memory_format=torch.channels_last)
        origins.append({"role": config.role, "source": config.id or str(config.path), "sha256": sha256(file)})
    return nets, origins


def freeze(net: nn.Module) -> nn.Module:
    """Eval mode, and no gradient into the weights; gradients still flow through."""
    return net.eval().requires_grad_(False)


def _load(config: TeacherConfig, shape: Shape, classes: int, root: Path | None) -> tuple[nn.Module, Path]:
    """The network and its file; a height of 0 in `shape` is not known."""
    if config.id is not None:
        card = read_card(config.id)
        _card_fits(card, shape, classes)
        _takes(config.id, card.model, shape, classes)
        file = weights_of(card, root)
        digest = card.sha256 if file.name == Path(card.file).name else None
        return _from_file(file, card.model, shape[0], classes, digest, card), file
    path = Path(str(config.path)).expanduser()
    if path.is_dir():
        bundle = Bundle.open(path, kind="checkpoint")
        if (info := bundle.manifest.model) is not None:
            _fits(str(path), info.input_shape, len(info.classes), shape, classes)
        return load_net(bundle), bundle.file("model.safetensors")
    if config.model is None:
        raise ConfigError(
            "a teacher file needs its architecture",
            where=str(path),
            fix="add teachers[].model: {name: resnet18}",
        )
    _takes(str(path), config.model, shape, classes)
    return _from_file(path, config.model, shape[0], classes, config.sha256), path


def weights_of(card: Card, root: Path | None = None) -> Path:
    """The file of a card's weights.

    Raises:
        ArtifactError: it is nowhere to be found; the message says where it should lie and where it comes from.
    """
    if (shipped := FOLDER / card.file).is_file():
        return shipped
    folders = list(_folders(root))
    for folder in folders:
        for file in (folder / card.file, (folder / card.file).with_suffix(".safetensors")):
            if file.is_file():
                return file
    raise ArtifactError(
        f"the weights of teacher {card.name} are not here: {card.file}",
        where=" or ".join(str(folder.absolute()) for folder in folders),
        fix=f"{card.published or 'install robustkd again'}; put it there, or point ROBUSTKD_TEACHERS at its folder",
    )


def _folders(root: Path | None) -> Iterator[Path]:
    if given := os.environ.get("ROBUSTKD_TEACHERS"):
        yield Path(given).expanduser()
    yield (root or Path(os.environ.get("ROBUSTKD_DATA", "data"))).expanduser() / "teachers"


def _card_fits(card: Card, shape: Shape, classes: int) -> None:
    size = card.size or 0
    _fits(card.name, (card.channels, size, size), card.classes, shape, classes)


def _fits(name: str, has: Shape, has_classes: int, wanted: Shape, classes: int) -> None:
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


def _takes(name: str, model: ModelConfig, shape: Shape, classes: int) -> None:
    """Push one image without content through the architecture, on a device that computes shapes only."""
    if not shape[1]:
        return
    with torch.device("meta"):
        net = model.build(channels=shape[0], classes=classes).eval()
        try:
            net(torch.empty(1, *shape))
        except RuntimeError as error:
            raise ConfigError(
                f"teacher {name} does not take images of {shape[1]}x{shape[2]} pixels",
                fix="choose a teacher of this data set",
            ) from error


def _from_file(
    file: Path, model: ModelConfig, channels: int, classes: int, digest: str | None, card: Card | None = None
) -> nn.Module:
    # the digest first: no parser sees a file that is not the one described
    if digest is not None and file.is_file() and sha256(file).removeprefix("sha256:") != digest.removeprefix("sha256:"):
        raise ArtifactError(
            f"{file.name} is not the file described: its digest differs",
            where=str(file),
            fix="fetch it again",
        )
    state = read_foreign(file, prefix=card.prefix, rename=card.rename) if card else read_foreign(file)
    net = model.build(channels=channels, classes=classes)
    load_state(net, state, str(file))
    return net
