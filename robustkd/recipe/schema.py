"""The recipe: everything a run needs, frozen and validated where it meets a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, model_validator

from robustkd.ascent import BatchNormMode
from robustkd.catalog import Shelf
from robustkd.datasets._base import DatasetConfig
from robustkd.errors import ConfigError
from robustkd.methods._base import Method, MethodConfig, Role
from robustkd.models._base import ModelConfig
from robustkd.recipe.addons import AddonsConfig
from robustkd.recipe.policy import AuditConfig
from robustkd.threat import Pixels, Start, ThreatModel

Precision = Literal["fp32", "bf16"]
Augmentation = Literal["crop", "flip", "autoaugment", "randaugment", "trivialaugment", "erasing", "mixup", "cutmix"]
MIXING = ("mixup", "cutmix")
"""Augmentations that blend images of a batch and leave labels as they are."""


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of a recipe: frozen, unknown keys refused."""


class Refused(ValueError):
    """A value that cannot be; carries the sentence that mends it, and the key it is about where pydantic cannot know."""

    def __init__(self, what: str, fix: str, *, key: tuple[str | int, ...] = ()) -> None:
        super().__init__(what)
        self.fix, self.key = fix, key


@dataclass(frozen=True)
class OnShelf:
    """Marks a field whose `name` selects an entry of a shelf, and validates it with that entry's config."""

    shelf: str

    def __call__(self, value: Any) -> Any:
        """The validated config; a value that names nothing passes through to pydantic."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return value
        name, colon, model = value["name"].partition(":")
        if colon and self.shelf == "models":  # timm:resnet10t is short for {name: timm, model: resnet10t}
            value = {**value, "name": name, "model": model}
        try:
            entry = Shelf(self.shelf).get(value["name"])
        except ConfigError as error:
            raise Refused(error.what, error.fix) from error
        config = entry.Config if self.shelf == "methods" else entry
        return config.model_validate(value)


AnyModel = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(OnShelf("models")), OnShelf("models")]
AnyDataset = Annotated[SerializeAsAny[DatasetConfig], BeforeValidator(OnShelf("datasets")), OnShelf("datasets")]
AnyMethod = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(OnShelf("methods")), OnShelf("methods")]


class Figures(Section, frozen=True):
    """Accuracies of a network as fractions, published or measured; on test images, under its own threat model."""

    clean: float | None = Field(None, ge=0, le=1)
    pgd10: float | None = Field(None, ge=0, le=1, description="under PGD of 10 steps or more")
    autoattack: float | None = Field(None, ge=0, le=1, description="a floor of what is measured under PGD-10")


class VerifyConfig(Section, frozen=True):
    """The sample of test images a teacher is measured on after loading."""

    clean: int | None = Field(None, ge=1, description="how many images; left out: 1,000 on a CPU, all on a GPU")
    pgd10: int = Field(200, ge=0, description="how many are attacked; 0: none")


class TeacherConfig(Section, frozen=True):
    """A teacher: a card on the shelf (`id`), or a source (`path`) with its architecture (`model`)."""

    role: Role = "robust"
    id: str | None = Field(None, description="name of a teacher card; see `robustkd list teachers`")
    path: str | None = Field(
        None,
        description="a file or folder here, one of our checkpoint bundles, hf:ORG/REPO/FILE, an address, "
        "torchvision:NAME or timm:NAME",
    )
    model: AnyModel | None = Field(None, description="architecture of the file at `path`")
    sha256: str | None = Field(None, description="expected digest of the file at `path`")
    reported: Figures | None = Field(None, description="what the file at `path` must reach on the test images")

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.id is None) == (self.path is None):
            raise ValueError("a teacher needs either id or path")
        return self


class StartConfig(Section, frozen=True):
    """Weights the student starts from. A bare string is the path."""

    path: str = Field(description="a checkpoint bundle of ours, a file or folder here, hf:ORG/REPO/FILE, or an address")
    sha256: str | None = Field(None, description="expected digest of the file")
    prefix: str = Field("", description="what every key of the file begins with, beside those of the usual wrappers")
    rename: dict[str, str] = Field({}, description="first parts of keys that the file calls otherwise")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class InnerConfig(Section, frozen=True):
    """The inner problem: how x_adv is searched for in training."""

    steps: int = Field(10, ge=0)
    step_size: Pixels = Field(2 / 255, description="on the [0, 1] scale; 2/255")
    eps: Pixels | None = Field(None, description="search radius in training; left out: the threat's")
    start: Start | None = Field(None, description="left out: the method's own")
    batch_norm: BatchNormMode | None = Field(None, description="student's mode in the attack; left out: the method's own")
    precision: Precision = Field("fp32", description="of the search; bf16 turns the signs of small gradients")


class Schedule(Section, frozen=True):
    """The learning rate over epochs."""

    name: Literal["step", "cosine", "onecycle", "constant"] = "step"
    milestones: tuple[float, ...] = Field(
        (100, 150), description="`step`: epochs, 0-based, from which lr is multiplied by gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1)
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up; `onecycle`: epochs of rise")


class TrainConfig(Section, frozen=True):
    """The outer problem: optimiser, schedule, selection, logging."""

    epochs: int = Field(200, ge=1)
    batch_size: int = Field(128, ge=1, description="global, over all processes")
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Schedule = Schedule()
    augment: tuple[Augmentation, ...] = Field(
        ("crop", "flip"),
        description="a set, always in the order crop, flip, autoaugment, randaugment, trivialaugment, erasing, then "
        "mixup and cutmix (only for methods that use no labels); training images only",
    )
    pad: int = Field(4, ge=0, description="zero padding of the random crop, in pixels")
    precision: Precision = Field("fp32", description="of the outer loss; bf16: autocast, losses and weights stay fp32")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, description="CPU threads; left out: the physical cores that are idle")
    select: Literal["pgd10", "clean", "weighted"] = Field("pgd10", description="what best means on the held-out images")
    select_every: int = Field(1, ge=1, description="epochs between evaluations on the held-out images")
    save_every: int = Field(100, ge=1, description="steps between resumable states; one is also written per epoch")
    grad_clip: float | None = Field(None, gt=0, description="largest gradient norm")
    speed: Literal["auto", "safe"] = Field(
        "auto", description="auto: attacks and teachers run with batch norms folded; safe: bit for bit the plain loop"
    )
    tensorboard: bool = True
    verify_teacher: bool = Field(True, description="measure a teacher after loading, where figures of it are known")


class Recipe(Section, frozen=True):
    """A run from data to verdict."""

    name: str = "run"
    dataset: AnyDataset
    student: AnyModel
    student_init: StartConfig | None = Field(None, description="weights to start from; left out: random ones, by seed")
    teachers: tuple[TeacherConfig, ...] = ()
    threat: ThreatModel = ThreatModel()
    inner: InnerConfig = InnerConfig()
    method: AnyMethod
    addons: AddonsConfig = AddonsConfig()
    train: TrainConfig = TrainConfig()
    targets: tuple[str, ...] = ("cpu-fp32",)
    audit: AuditConfig = AuditConfig()
    seed: int = Field(0, ge=0, lt=2**31)

    def method_class(self) -> type[Method[Any, Any]]:
        """The method's shelf entry."""
        entry: type[Method[Any, Any]] = Shelf("methods").get(self.method.name)
        return entry

    def search_threat(self) -> ThreatModel:
        """The ball training searches in: the threat's norm, with `inner.eps` where it is given."""
        eps = self.threat.eps if self.inner.eps is None else self.inner.eps
        return ThreatModel(norm=self.threat.norm, eps=eps)

    @model_validator(mode="after")
    def _roles(self) -> Recipe:
        wanted = sorted(self.method_class().roles_for(self.method))
        given = sorted(t.role for t in self.teachers)
        if wanted != given:
            need, name = " and ".join(wanted) or "no", self.method.name
            mend = ", ".join(f"{{role: {role}, id: NAME}}" for role in wanted)
            raise Refused(
                f"teachers: {name} wants {need} teacher(s), the recipe gives {', '.join(given) or 'none'}",
                f"teachers: [{mend}]",
                key=("teachers" if "teachers" in self.model_fields_set else "method",),
            )
        return self

    @model_validator(mode="after")
    def _labels_stay_true(self) -> Recipe:
        mixing = [name for name in MIXING if name in self.train.augment]
        if mixing and self.method_class().labels_for(self.method):
            shelf = Shelf("methods")
            free = ", ".join(name for name in shelf.names() if not shelf.get(name).labels)
            raise Refused(
                f"train.augment: {mixing[0]} mixes images and no labels, and {self.method.name} trains on labels",
                f"leave {' and '.join(mixing)} out, or take a method without labels: {free}",
                key=("train", "augment"),
            )
        return self

    @model_validator(mode="after")
    def _addons_fit(self) -> Recipe:
        for what, fix in self.addons.problems(self.method_class(), self.method, epochs=self.train.epochs):
            raise Refused(what, fix)
        return self
