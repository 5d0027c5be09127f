"""Teachers: a card on the shelf or the user's own file; digest checked, strictly loaded, frozen, in eval mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from robustkd.bundle import Bundle, sha256
from robustkd.errors import ArtifactError, ConfigError, nearest
from robustkd.methods._base import Role
from robustkd.models._base import ModelConfig
from robustkd.models._files import load_net, load_state, read_state
from robustkd.recipe.reading import read_yaml, validate
from robustkd.recipe.schema import AnyModel, TeacherConfig
from robustkd.threat import ThreatModel

FOLDER = Path(__file__).parent.parent / "teachers"


class Card(BaseModel, frozen=True, extra="forbid"):
    """What is known of a teacher: one YAML file of `robustkd/teachers/`."""

    name: str
    summary: str
    model: AnyModel
    channels: int
    classes: int
    file: str
    sha256: str
    dataset: str
    threat: ThreatModel
    measured: dict[str, Any]
    recipe: str
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


def load_teachers(
    configs: tuple[TeacherConfig, ...], *, channels: int, classes: int, device: torch.device
) -> tuple[dict[Role, nn.Module], list[dict[str, str]]]:
    """The teachers by role, and for the manifest where each came from with its digest.

    Raises:
        ArtifactError: a file is missing, is not the one described, or does not fit its architecture.
        ConfigError: a teacher has another number of classes or channels than the data.
    """
    nets: dict[Role, nn.Module] = {}
    origins = []
    for config in configs:
        net, file = _load(config, channels, classes)
        nets[config.role] = freeze(net).to(device).to(memory_format=torch.channels_last)
        origins.append({"role": config.role, "source": config.id or str(config.path), "sha256": sha256(file)})
    return nets, origins


def freeze(net: nn.Module) -> nn.Module:
    """Eval mode, and no gradient into the weights; gradients still flow through."""
    return net.eval().requires_grad_(False)


def _load(config: TeacherConfig, channels: int, classes: int) -> tuple[nn.Module, Path]:
    if config.id is not None:
        card = read_card(config.id)
        _fits(config.id, (card.channels, card.classes), (channels, classes))
        file = FOLDER / card.file
        return _from_file(file, card.model, channels, classes, card.sha256), file
    path = Path(str(config.path)).expanduser()
    if path.is_dir():
        bundle = Bundle.open(path, kind="checkpoint")
        if (info := bundle.manifest.model) is not None:
            _fits(str(path), (info.input_shape[0], len(info.classes)), (channels, classes))
        return load_net(bundle), bundle.file("model.safetensors")
    if config.model is None:
        raise ConfigError(
            "a teacher file needs its architecture",
            where=str(path),
            fix="add teachers[].model: {name: resnet18}",
        )
    return _from_file(path, config.model, channels, classes, config.sha256), path


def _fits(name: str, has: tuple[int, int], wanted: tuple[int, int]) -> None:
    if has != wanted:
        raise ConfigError(
            f"teacher {name} is for {has[0]} channels and {has[1]} classes, the data has {wanted[0]} and {wanted[1]}",
            where="teachers",
            fix="choose a teacher of this data set",
        )


def _from_file(file: Path, model: ModelConfig, channels: int, classes: int, digest: str | None) -> nn.Module:
    state = read_state(file)
    if digest is not None and sha256(file).removeprefix("sha256:") != digest.removeprefix("sha256:"):
        raise ArtifactError(
            f"{file.name} is not the file described: its digest differs",
            where=str(file),
            fix="fetch it again",
        )
    net = model.build(channels=channels, classes=classes)
    load_state(net, state, str(file))
    return net
