"""Students for images of 96 pixels and more, with the ImageNet stem: torchvision's networks, and their pretrained weights.

Pretrained networks expect normalised images, so their config is filled with ImageNet's mean and standard deviation, unless
`normalize` says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from robustkd.catalog import needed
from robustkd.errors import ArtifactError
from robustkd.models._base import ModelConfig, bare

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet on the [0, 1] scale, as torchvision's weights were trained with."""


def torchvision_models(name: str) -> Any:
    """`torchvision.models`.

    Raises:
        RequirementError: torchvision does not import; the student `name` is said to need it.
    """
    return needed("torchvision.models", f"student {name} is torchvision's", fix="pip install 'robustkd[train]'")


class ImagenetConfig(ModelConfig, frozen=True):
    """What the students of torchvision share: they may start from weights trained on ImageNet."""

    pretrained: bool = False

    @model_validator(mode="before")
    @classmethod
    def _normalised(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pretrained") is True and "normalize" not in values:
            mean, std = IMAGENET
            return {**values, "normalize": {"mean": mean, "std": std}}
        return values


def fetched(weights: Any) -> dict[str, Tensor]:
    """The state of a network of torchvision, from torch.hub's folder or from the address that torchvision knows.

    Raises:
        ArtifactError: it is in neither place, or is no weights.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
        return state
    except Exception as error:  # of urllib, of the file system, or of the reader of a damaged file
        said = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise ArtifactError(
            f"the pretrained weights cannot be had: {said}",
            where=str(file),
            fix=f"go online, or put {weights.url} there by hand; or set student.pretrained=false",
        ) from error


def adopt(net: nn.Module, state: dict[str, Tensor], *, stem: str, head: Literal["fc", "classifier.1"]) -> None:
    """Take over pretrained weights: all but the head where the classes differ, the stem summed up for grey images.

    Args:
        net: the network.
        state: of the same network for three channels and 1,000 classes.
        stem: key of the first convolution's weight; on grey images its sum over the colours computes the same.
        head: the last layer, which keeps its own start where it has other rows.
    """
    net = bare(net)
    own = net.state_dict()
    state = dict(state)
    if own[stem].shape[1] == 1:
        state[stem] = state[stem].sum(1, keepdim=True)
    for key in (f"{head}.weight", f"{head}.bias"):
        if own[key].shape != state[key].shape:
            state[key] = own[key]
    net.load_state_dict(state)
