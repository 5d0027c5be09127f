"""Any classifier of timm as a student: `student: timm:resnet10t` in a recipe.

timm chooses stem and widths by the name; `options` goes to `timm.create_model`, for example `{img_size: 96}` for a vision
transformer. A pretrained network expects normalised images, so its config is filled with the mean and standard deviation
that timm states, unless `normalize` says otherwise.

Wightman, "PyTorch Image Models", https://github.com/huggingface/pytorch-image-models
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from robustkd.errors import ArtifactError, ConfigError, RequirementError, nearest
from robustkd.models._base import ModelConfig, bare

Scalar = bool | int | float | str | None
_OURS = ("model_name", "num_classes", "in_chans", "pretrained", "checkpoint_path", "features_only", "cache_dir")


class TimmConfig(ModelConfig, frozen=True):
    """A classifier of timm."""

    summary: ClassVar[str] = "any classifier of timm: student: timm:NAME; pretrained on request"
    name: Literal["timm"] = "timm"
    model: str = Field(min_length=1, description="its name in timm, for example resnet10t")
    pretrained: bool = Field(False, description="start from timm's weights, behind the mean/std that timm states for them")
    options: dict[str, Scalar] = Field({}, description="further arguments of timm.create_model, for example img_size")

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: dict[str, Scalar]) -> dict[str, Scalar]:
        if taken := sorted(set(options) & set(_OURS)):
            raise ValueError(f"{taken[0]} is not an option: the data and student.pretrained decide it")
        return options

    @model_validator(mode="before")
    @classmethod
    def _normalised(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pretrained") is True and "normalize" not in values:
            about = _timm(str(values.get("model"))).get_pretrained_cfg(str(values.get("model")))
            return {**values, "normalize": {"mean": about.mean, "std": about.std}}
        return values

    @property
    def architecture(self) -> str:
        """What the bundle says the network is."""
        return f"timm:{self.model}"

    def begin(self, net: nn.Module, *, channels: int, classes: int) -> None:
        """Load the pretrained weights, where they are asked for; timm fits stem and head.

        Raises:
            ArtifactError: they cannot be fetched.
        """
        if not self.pretrained:
            return
        timm = _timm(self.model)
        try:
            with torch.random.fork_rng(devices=[]):  # building a second one must not move the run's draws
                start = timm.create_model(self.model, pretrained=True, **self._arguments(channels, classes))
        except Exception as error:  # of the Hub's downloader, whatever the network does to it
            said = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise ArtifactError(
                f"the pretrained weights of {self.architecture} cannot be had: {said}",
                where="student.pretrained",
                fix="go online, or put them into the Hub's folder (HF_HOME); or set student.pretrained=false",
            ) from error
        bare(net).load_state_dict(start.state_dict())

    def _net(self, channels: int, classes: int) -> nn.Module:
        timm = _timm(self.model)
        try:
            net: nn.Module = timm.create_model(self.model, pretrained=False, **self._arguments(channels, classes))
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"timm does not build {self.model} so: {error}", where="student.options", fix="change or drop these options"
            ) from error
        return net

    def _arguments(self, channels: int, classes: int) -> dict[str, Any]:
        return {**self.options, "in_chans": channels, "num_classes": classes}


def _timm(model: str) -> Any:
    """The package, which knows the model.

    Raises:
        RequirementError: timm is not installed.
        ConfigError: it has no such model.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # it imports torchvision, which may be for another torch
        raise RequirementError(
            f"student timm:{model} needs timm", where=str(error), fix="pip install 'robustkd[timm]'"
        ) from error
    if not timm.is_model(model):
        close = nearest(model, timm.list_models())
        fix = close if close.startswith("did") else "see timm.list_models()"
        raise ConfigError(f"timm has no model {model}", where="student", fix=fix)
    return timm


ENTRY = TimmConfig
