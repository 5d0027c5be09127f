"""The contract of the methods shelf: what a paper says about the inner and the outer problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from robustkd.ascent import BatchNormMode, Objective
from robustkd.threat import Start

Role = Literal["robust", "clean"]
Terms = dict[str, Tensor]
"""Loss terms by name, 0-dimensional and detached; what `advance` and the metrics see."""


class MethodConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Every method has a name; subclasses add the paper's knobs with the recommended defaults."""

    name: str


@dataclass(frozen=True)
class Nets:
    """The student, and its frozen teachers by role, all mapping images in [0, 1] to logits."""

    student: nn.Module
    teachers: dict[Role, nn.Module]

    @property
    def robust(self) -> nn.Module:
        """The robust teacher."""
        return self.teachers["robust"]


@dataclass(frozen=True)
class Batch:
    """Clean images x (N, C, H, W), labels y (N,), and the adversarial images found for them.

    `weights` (N,) are an add-on's, for the adversarial teacher terms; None where all images count the same.
    """

    x: Tensor
    y: Tensor
    x_adv: Tensor
    weights: Tensor | None = None

    def weighted(self, per_image: Tensor) -> Tensor:
        """A teacher's adversarial term (N,) with the weights of the images, if there are any."""
        return per_image if self.weights is None else self.weights * per_image


@dataclass(frozen=True)
class Clock:
    """Where training stands: the 0-based epoch of `epochs`, the 0-based global step, and lr over its base value."""

    epoch: int
    epochs: int
    step: int
    lr_scale: float = 1.0


C = TypeVar("C", bound=MethodConfig)
S = TypeVar("S")


class Method(ABC, Generic[C, S]):
    """One paper. `S` is its state, often None; state is made by `init` and returned by `advance`."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    equation: ClassVar[str]
    departures: ClassVar[str] = "none"
    roles: ClassVar[tuple[Role, ...]] = ()
    through_teacher: ClassVar[bool] = False
    adversarial: ClassVar[bool] = True
    labels: ClassVar[bool] = True  # training looks at them
    includes: ClassVar[tuple[str, ...]] = ()  # add-ons (keys of `addons`) that are part of it already
    start: ClassVar[Start] = "noise"
    attack_mode: ClassVar[BatchNormMode] = "eval"
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: C, *, classes: int) -> None:
        self.config, self.classes = config, classes

    @classmethod
    def roles_for(cls, config: MethodConfig) -> tuple[Role, ...]:
        """The teachers it wants with these knobs: `roles`, which are those of the default knobs, unless one changes them."""
        return cls.roles

    @classmethod
    def labels_for(cls, config: MethodConfig) -> bool:
        """Whether training looks at labels with these knobs: `labels`, unless a knob changes it."""
        return cls.labels

    def init(self) -> S | None:
        """The state before the first step."""
        return None

    @abstractmethod
    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """The objective the attack maximises, per image: x_adv -> (N,)."""

    @abstractmethod
    def loss(self, nets: Nets, batch: Batch, state: S, clock: Clock) -> tuple[Tensor, Terms]:
        """The outer loss (a scalar, or parts that `weigh` joins) and its terms by name.

        The student's passes run in the paper's order; `state` is that of the step before.
        """

    def advance(self, state: S, terms: Terms, clock: Clock) -> S:
        """The state after this step's losses are known; `terms` are means over all ranks."""
        return state

    def weigh(self, parts: Tensor, state: S) -> Tensor:
        """The scalar to differentiate from what `loss` gave and what `advance` made of the state; linear in `parts`."""
        return parts

    def gauges(self, state: S) -> dict[str, float]:
        """What of the state belongs in the log: loss weights, temperatures."""
        return {}

    def save(self, state: S) -> dict[str, Any]:
        """The state as JSON, for the resumable state of a run."""
        return {}

    def restore(self, saved: dict[str, Any]) -> S | None:
        """The state back from what `save` gave."""
        return self.init()


@torch.no_grad()
def fixed(net: nn.Module, x: Tensor) -> Tensor:
    """A teacher's logits without gradient."""
    logits: Tensor = net(x)
    return logits


def terms(**values: Tensor) -> Terms:
    """Detached terms for the log."""
    return {name: value.detach() for name, value in values.items()}
