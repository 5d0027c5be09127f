"""Teachers: a card on the shelf or the user's own file; digest checked, strictly loaded, frozen, in eval mode.

The weights of most cards do not ship: they are looked for in ROBUSTKD_TEACHERS, then in `teachers` under the data root,
and fetched to the first of these where the card knows their source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from robustkd.bundle import MANIFEST, Bundle, sha256
from robustkd.errors import ArtifactError, ConfigError, nearest
from robustkd.methods._base import Role
from robustkd.models._base import ModelConfig
from robustkd.models._files import load_net, load_state
from robustkd.models._foreign import read_foreign
from robustkd.recipe.reading import Key, read_yaml, validate
from robustkd.recipe.schema import AnyModel, Figures, Recipe, TeacherConfig, VerifyConfig
from robustkd.threat import ThreatModel
from robustkd.training.fitting import Shape, fits, needs_model, same_order, takes, tried
from robustkd.training.places import folders, here
from robustkd.training.published import build_published, published
from robustkd.training.sources import Listen, bring, digest_of, locate, remember, remote

FOLDER = Path(__file__).parent.parent / "teachers"
UNHEARD: Listen = lambda event: None  # noqa: E731


class CardVerify(VerifyConfig, frozen=True):
    """The sample, and for which data sets beside the card's own the figures hold."""

    also: tuple[str, ...] = ()


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
    source: str | None = Field(None, description="hf:ORG/REPO/FILE or an address, from which the file is fetched")
    paper: str = ""
    reported: dict[str, Any] = Field({}, description="accuracies as published, fractions; not measured here")
    measured: dict[str, Any] = Field({}, description="accuracies measured here, fractions")
    verify: CardVerify = CardVerify()
    recipe: str | None = Field(None, description="the shipped recipe that trains it")
    licence: str

    def figures(self, dataset: str) -> tuple[Figures, bool]:
        """What the network must reach on the test images of a data set: as measured here, otherwise as reported.

        Returns:
            The figures, empty where none is known, and whether they are of exactly these images: all of the test split.
        """
        if dataset in (self.dataset, *self.verify.also):
            for told in (self.measured, *(v for v in self.measured.values() if isinstance(v, dict)), self.reported):
                if found := {key: told[key] for key in Figures.model_fields if key in told}:
                    return Figures.model_validate(found), told is self.reported and dataset == self.dataset
        return Figures(), False


@dataclass(frozen=True)
class Expected:
    """What is said of a teacher, for the one who measures it: accuracies, the threat they hold for, and the sample.

    Where nothing is said of it on this data, the figures are empty; `exact` ones are of all test images.
    """

    name: str
    where: str
    digest: str
    figures: Figures
    exact: bool
    threat: ThreatModel | None
    sample: VerifyConfig


Measure = Callable[[nn.Module, Expected], str]
"""Measures a teacher, and says what came out; raises where it is not what is said of it."""


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
    dataset: str = "",
    threat: ThreatModel | None = None,
    measure: Measure | None = None,
    trust_pickle: bool = False,
    record: bool = True,
    names: tuple[str, ...] = (),
    listen: Listen = UNHEARD,
) -> tuple[dict[Role, nn.Module], list[dict[str, str]]]:
    """The teachers by role, and for the manifest where each came from with its digest.

    Args:
        configs: the recipe's teachers.
        channels: of the images.
        classes: of the data.
        device: where the teachers go.
        size: height and width of the images, in pixels; left out, it is not checked.
        root: the data root, whose `teachers` may hold the weights; left out, ROBUSTKD_DATA, then ./data.
        dataset: its name, by which a card knows whether its figures hold.
        threat: what a recipe's own figures of a teacher hold for.
        measure: called with each network; left out, none is measured.
        trust_pickle: unpickle in full where the digest is stated, on the card or in the recipe.
        record: write down the digest of a file that is used for the first time.
        names: of the classes, in the order of the labels; a checkpoint bundle knows its own.
        listen: called with the events of downloads.

    Raises:
        ArtifactError: a file is missing, is not the one described, or does not fit its architecture.
        ConfigError: a teacher has another number of classes or channels than the data, or takes images of another size.
        RequirementError: the source of a teacher needs a package that is not installed.
        NumericsError: a teacher does not answer as is said of it.
    """
    nets: dict[Role, nn.Module] = {}
    origins = []
    shape = (channels, *(size or (0, 0)))
    for index, config in enumerate(configs):
        try:
            found = _Finder(shape, classes, root, trust_pickle, names, listen).find(config)
        except ConfigError as error:
            raise ConfigError(error.what, where=error.where or f"teachers[{index}]", fix=error.fix) from error
        net = nets[config.role] = freeze(found.net).to(device).to(memory_format=torch.channels_last)
        origin = {"role": config.role, "source": config.id or str(config.path), "sha256": found.digest}
        if measure is not None:
            origin["measured"] = measure(net, _expected(config, found, dataset, threat))
        if found.first and record:
            remember(found.file, found.digest)
        origins.append(origin)
    return nets, origins


def freeze(net: nn.Module) -> nn.Module:
    """Eval mode, and no gradient into the weights; gradients still flow through."""
    return net.eval().requires_grad_(False)


def _expected(config: TeacherConfig, found: _Found, dataset: str, threat: ThreatModel | None) -> Expected:
    file, digest = str(found.file), found.digest
    if config.id is None:
        return Expected(str(config.path), file, digest, config.reported or Figures(), False, threat, VerifyConfig())
    card = read_card(config.id)
    return Expected(card.name, file, digest, *card.figures(dataset), card.threat, card.verify)


@dataclass(frozen=True)
class _Found:
    """A network, its file and the file's digest; `first`: the digest is to be recorded."""

    net: nn.Module
    file: Path
    digest: str
    first: bool = False


@dataclass(frozen=True)
class _Finder:
    """Finds teachers for images of a shape (a height of 0 is not known) and a number of classes."""

    shape: Shape
    classes: int
    root: Path | None
    trust_pickle: bool
    names: tuple[str, ...]
    listen: Listen

    def find(self, config: TeacherConfig) -> _Found:
        """The network of a teacher, checked as far as can be without images."""
        if config.id is not None:
            return self._by_card(config.id)
        source = str(config.path)
        if published(source):
            net, digest = build_published(source, channels=self.shape[0], classes=self.classes)
            tried(source, net.eval(), self.shape, torch.device("cpu"))
            return _Found(net, Path(source), digest)
        if remote(source):
            needs_model(source, config.model)
        path = locate(source, self.root, digest=config.sha256, listen=self.listen)
        if (path / MANIFEST).is_file():
            return self._bundle(path)
        model = needs_model(source, config.model)
        takes(source, model, self.shape, self.classes)
        return self._file(path, model, config.sha256, first=remote(source))

    def _by_card(self, name: str) -> _Found:
        card = read_card(name)
        _card_fits(card, self.shape, self.classes)
        takes(name, card.model, self.shape, self.classes)
        file = weights_of(card, self.root, listen=self.listen)
        # a .safetensors of the same name is another file than the one the digest is of
        digest = card.sha256 if file.name == Path(card.file).name or card.source is not None else None
        return self._file(file, card.model, digest, first=True, prefix=card.prefix, rename=card.rename)

    def _bundle(self, path: Path) -> _Found:
        bundle = Bundle.open(path, kind="checkpoint")
        if (info := bundle.manifest.model) is not None:
            fits(str(path), info.input_shape, len(info.classes), self.shape, self.classes)
            same_order(str(path), info.classes, self.names)
        file = bundle.file("model.safetensors")
        return _Found(load_net(bundle), file, sha256(file))

    def _file(self, file: Path, model: ModelConfig, wanted: str | None, *, first: bool, **quirks: Any) -> _Found:
        digest = digest_of(file, wanted, first=first)
        trusted = digest if self.trust_pickle and wanted is not None else None
        state = read_foreign(file, trusted=trusted, **quirks)
        net = model.build(channels=self.shape[0], classes=self.classes)
        load_state(net, state, str(file))
        return _Found(net, file, digest, first=first and wanted is None)


def weights_of(card: Card, root: Path | None = None, *, listen: Listen = UNHEARD) -> Path:
    """The file of a card's weights, fetched where it is not here and the card knows its source.

    Raises:
        ArtifactError: it is nowhere to be found; the message says where it should lie and where it comes from.
    """
    if (file := here(card.file, root, shipped=FOLDER)) is not None:
        return file
    if card.source is not None:
        return bring(card.source, root, digest=card.sha256, listen=listen)
    raise ArtifactError(
        f"the weights of teacher {card.name} are not here: {card.file}",
        where=" or ".join(str(folder.absolute()) for folder in folders(root)),
        fix=f"{card.published or 'install robustkd again'}; put it there, or point ROBUSTKD_TEACHERS at its folder",
    )


def _card_fits(card: Card, shape: Shape, classes: int) -> None:
    size = card.size or 0
    fits(card.name, (card.channels, size, size), card.classes, shape, classes)
