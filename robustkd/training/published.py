"""Clean networks by the name their library gives them: `torchvision:resnet18`, `timm:NAME`."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from robustkd.catalog import needed
from robustkd.errors import ArtifactError, ConfigError, nearest
from robustkd.models._base import Normalization, Normalized
from robustkd.models._files import portable

LIBRARIES = ("torchvision:", "timm:")


def published(source: str) -> bool:
    """Whether a source names a network of torchvision or timm."""
    return source.startswith(LIBRARIES)


def build_published(source: str, *, channels: int, classes: int) -> tuple[nn.Module, str]:
    """The pretrained network behind its own normalisation, and the digest of its tensors.

    Args:
        source: `torchvision:NAME` or `timm:NAME`.
        channels: of the images; these networks take three.
        classes: of the data; the network keeps the classes it was trained on.

    Raises:
        RequirementError: the library is not installed, or was made for another torch.
        ConfigError: it has no such network, or one for other channels or classes.
        ArtifactError: the weights cannot be fetched.
    """
    library, _, name = source.partition(":")
    net, mean, std = _torchvision(name, source) if library == "torchvision" else _timm(name, source)
    if channels != len(mean):
        raise ConfigError(
            f"teacher {source} is for {len(mean)} channels, the data has {channels}", fix="choose a teacher of this data set"
        )
    rows = _outputs(net)
    if rows != classes:
        raise ConfigError(
            f"teacher {source} is for {rows} classes, the data has {classes}",
            fix="choose a teacher of this data set, or fine-tune this one and give its file",
        )
    return Normalized(Normalization(mean=mean, std=std), net), _digest(net)


def _torchvision(name: str, source: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    models = needed("torchvision", f"teacher {source} needs torchvision", fix="pip install 'robustkd[train]'").models
    names = models.list_models(module=models)
    if name not in names:
        raise ConfigError(f"torchvision has no classifier {name}", fix=_like(name, names))
    weights = models.get_model_weights(name).DEFAULT
    net = _fetched(lambda: models.get_model(name, weights=weights), source, "torch.hub's folder (TORCH_HOME)")
    shown = weights.transforms()
    return net, tuple(shown.mean), tuple(shown.std)


def _timm(name: str, source: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    timm = needed("timm", f"teacher {source} needs timm", fix="pip install 'robustkd[timm]'")
    # names with a prefix of their own (hf-hub:, local-dir:) are not in the list
    if ":" not in name and not timm.is_model(name):
        raise ConfigError(f"timm has no network {name}", fix=_like(name, timm.list_models(pretrained=True)))
    net = _fetched(lambda: timm.create_model(name, pretrained=True), source, "the Hub's folder (HF_HOME)")
    shown = net.pretrained_cfg
    return net, tuple(shown["mean"]), tuple(shown["std"])


def _like(name: str, names: list[str]) -> str:
    """The nearest name; a list of hundreds would help nobody."""
    found = nearest(name, names)
    return found if found.startswith("did you mean") else "see its list_models()"


def _fetched(build: Any, source: str, folder: str) -> Any:
    try:
        return build()
    except Exception as error:  # of the library's own downloader, whatever the network does to it
        said = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise ArtifactError(
            f"the weights of {source} cannot be fetched: {said}",
            where=source,
            fix=f"go online; or put them into {folder} by hand",
        ) from error


def _outputs(net: nn.Module) -> int:
    """The rows of the last linear or convolutional layer."""
    last = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    return int(last.weight.shape[0])


def _digest(net: nn.Module) -> str:
    from safetensors.torch import save

    return f"sha256:{hashlib.sha256(save(portable(net))).hexdigest()}"
