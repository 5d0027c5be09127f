"""What may be added to any method: the section `addons` of a recipe. Everything here is off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from robustkd.methods._base import Method, MethodConfig


class Addon(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One add-on's knobs; unknown keys refused."""


class AwpConfig(Addon, frozen=True):
    """Adversarial weight perturbation (Wu et al., NeurIPS 2020): each step is taken where the weights are worse."""

    gamma: float = Field(
        0.005, ge=0, description="length of the shift of each weight tensor over its norm; 0.005 for TRADES, 0.01 for PGD-AT"
    )
    start_epoch: int = Field(0, ge=0, description="0-based epoch from which it acts; 9 is the published TRADES-AWP")


class AverageConfig(Addon, frozen=True):
    """A running average of the student's weights, which is then what is measured, selected, saved and exported."""

    name: Literal["ema", "swa"] = Field(
        description="ema: exponential, after every step; swa: the plain mean of the weights at the end of every epoch"
    )
    decay: float | None = Field(None, ge=0, lt=1, description="ema: share of the old average kept in a step; left out: 0.999")
    start_epoch: int = Field(
        0, ge=0, description="0-based epoch from which weights count; before it the student itself is used"
    )

    @model_validator(mode="after")
    def _decay_is_of_ema(self) -> AverageConfig:
        if self.name == "swa" and self.decay is not None:
            raise ValueError("swa is a plain mean and has no decay")
        return self


class IgdmConfig(Addon, frozen=True):
    """IGDM (Lee et al., ICLR 2025): match how the robust teacher's logits change along the perturbation."""

    alpha: float = Field(
        1.0, ge=0, description="weight in the last epoch, rising linearly from alpha / epochs; 10 on CIFAR-100"
    )


class EntropyWeightsConfig(Addon, frozen=True):
    """SAAD's weights (TMLR 2026): images count by the robust teacher's entropy on x'."""

    scale: float = Field(5.0, gt=0, description="w_i = scale * (H_i - smallest H of the batch)")


class AddonsConfig(Addon, frozen=True):
    """Add-ons to the method; each is off where it is left out or null."""

    awp: AwpConfig | None = Field(None, description="adversarial weight perturbation: {gamma: 0.005, start_epoch: 9}")
    average: AverageConfig | None = Field(
        None, description="averaged weights: {name: ema, decay: 0.999} or {name: swa, start_epoch: 95}"
    )
    igdm: IgdmConfig | None = Field(None, description="gradient matching with the robust teacher: {alpha: 1}")
    entropy_weights: EntropyWeightsConfig | None = Field(
        None, description="weights of the teacher's adversarial terms by its entropy on x': {scale: 5}"
    )

    def problems(self, method: type[Method[Any, Any]], config: MethodConfig, *, epochs: int) -> Iterator[tuple[str, str]]:
        """What of it cannot go with this method or never acts in so many epochs: (what is wrong, how to mend it)."""
        guiding = {"igdm": self.igdm, "entropy_weights": self.entropy_weights}
        for key in (key for key, given in guiding.items() if given is not None):
            drop = f"--set addons.{key}=null"
            if "robust" not in method.roles_for(config):
                yield f"addons.{key} needs a robust teacher, and {config.name} has none", f"another method, or {drop}"
            elif not method.adversarial:
                yield f"addons.{key} needs an attack in training, and {config.name} has none", f"another method, or {drop}"
            elif key in method.includes:
                yield f"addons.{key} is part of {config.name} already", f"its knobs are under method; {drop}"
        for key, timed in (("awp", self.awp), ("average", self.average)):
            if timed is not None and timed.start_epoch >= epochs:
                what = f"addons.{key}.start_epoch is {timed.start_epoch}, and epochs run from 0 to {epochs - 1}: it never acts"
                yield what, f"--set addons.{key}.start_epoch={epochs // 2}, or --set addons.{key}=null"
