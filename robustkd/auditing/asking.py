"""What an audit command asks for, put together from its options, the bundle and its recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from robustkd.auditing.artifact import Runtime, Subject, find_source, open_subject
from robustkd.auditing.graph import graph_wanted
from robustkd.auditing.kit import check_place
from robustkd.auditing.run import Order
from robustkd.auditing.steps import Event
from robustkd.auditing.store import partial_folder
from robustkd.auditing.unseen import unseen_images
from robustkd.bundle import MANIFEST, Bundle
from robustkd.datasets._base import ImageSet
from robustkd.datasets._open import open_dataset
from robustkd.engines.pytorch import chosen
from robustkd.errors import ArtifactError, ConfigError
from robustkd.recipe.policy import AuditConfig, Policy, bounds_told, read_policy
from robustkd.result import AuditResult
from robustkd.threat import ThreatModel


@dataclass(frozen=True)
class Ask:
    """What a command asks for, before images and engine are opened."""

    subject: Subject
    config: AuditConfig
    policy: Policy
    threat: ThreatModel
    folder: Path
    source: Path | None
    dataset: str | None
    data_root: Path | None
    seed: int
    resume: bool
    save_kit: Path | None
    say: Callable[[str], None]
    device: str = "cpu"
    runtime: Runtime | None = None

    @contextmanager
    def order(self, folder: Path, *, resume: bool, shards: tuple[Path, ...] = ()) -> Iterator[Order]:
        """The order, with the engine open while it is held."""
        if resume and not shards and not partial_folder(folder).is_dir():
            self.say("there is nothing to resume here: the audit starts from the beginning")
        spec = self.dataset or self.subject.recipe.get("dataset")
        images, index = _images(spec, self.data_root, self.config.n, self.seed, self.say)
        with self.subject.engine(images.shape) as engine:
            source = find_source(self.subject, self.source, self.say, self.device)
            yield Order(
                engine,
                artifact=self.subject.facts,
                images=images,
                threat=self.threat,
                policy=self.policy,
                audit=self.config,
                source=source,
                twin=self.subject.net,
                graph=graph_wanted(
                    Path(self.subject.facts.path),
                    self.subject.bundle,
                    net=self.subject.net is not None,
                    source=source is not None,
                    precision=engine.info.precision,
                    policy=self.policy,
                    device=self.device,
                ),
                seed=self.seed,
                folder=folder,
                resume=resume,
                index=index,
                shards=shards,
                progress=lambda event: self.say(_line(event)),
                unseen=unseen_images(spec, self.data_root, images, self.seed) if spec is not None else None,
                reopen=self.subject.reopen,
            )

    def found(self) -> AuditResult | None:
        """The result of a finished audit in the folder, if resuming is asked for and it is the same; None: there is none.

        Raises:
            ArtifactError: something else is there, or resuming is not asked for.
        """
        if (self.folder / MANIFEST).is_file():
            return _finished(self)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ArtifactError("there is something here already", where=str(self.folder), fix="choose another --output")
        return None


def ask(
    artifact: Path | str | Subject,
    *,
    source: Path | str | None = None,
    dataset: str | None = None,
    data_root: Path | str | None = None,
    eps: float | str | None = None,
    norm: str | None = None,
    seed: int = 0,
    resume: bool = False,
    save_kit: Path | str | None = None,
    output: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
    device: str = "cpu",
    runtime: Runtime | None = None,
    **options: Any,
) -> Ask:
    """Put an order together; the arguments are those of `robustkd.audit`, its other options go to `AuditConfig`.

    Raises:
        ArtifactError: the artifact is missing, damaged or foreign.
        ConfigError: the policy or a value is wrong, or a bare file came without eps.
    """
    kit = None if save_kit is None else Path(save_kit)
    if kit is not None:
        check_place(kit)
    device = str(chosen(device))
    subject = artifact if isinstance(artifact, Subject) else open_subject(Path(artifact), device=device, runtime=runtime)
    config = _config(subject.recipe, **options)
    if kit is not None and config.stochastic:
        raise ConfigError(
            "a kit asks every image once, which tells little of a random engine",
            where="--save-kit",
            fix="leave out one of both",
        )
    return Ask(
        subject=subject,
        config=config,
        policy=read_policy(config.policy),
        threat=_threat(subject, eps, norm),
        folder=Path(output) if output else subject.home,
        source=Path(source) if source is not None else None,
        dataset=dataset,
        data_root=None if data_root is None else Path(data_root),
        seed=seed,
        resume=resume,
        save_kit=kit,
        say=progress or (lambda line: None),
        device=device,
        runtime=runtime,
    )


def _config(recipe: dict[str, Any], **options: Any) -> AuditConfig:
    """The recipe's section with the command's options; its defaults do not count as set, nor beside another policy."""
    given = {key: value for key, value in options.items() if value is not None}
    plain = AuditConfig().model_dump()
    own = {key: value for key, value in (recipe.get("audit") or {}).items() if key not in plain or value != plain[key]}
    if "policy" in given:
        own = {key: value for key, value in own.items() if key not in ("tolerance", "min_robust", "min_clean")}
    try:
        return AuditConfig.model_validate({**own, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"audit.{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where="audit options",
            fix="see `robustkd audit --help` for the range of each",
        ) from error


def _threat(subject: Subject, eps: float | str | None, norm: str | None) -> ThreatModel:
    held = subject.threat
    if held is None and eps is None:
        raise ConfigError("nothing here says what it should withstand", where=subject.facts.path, fix="give --eps 8/255")
    values = held.model_dump() if held is not None else {}
    values |= {key: value for key, value in (("eps", eps), ("norm", norm)) if value is not None}
    try:
        return ThreatModel.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{'.'.join(map(str, first['loc']))}: {message}", where="--eps, --norm", fix="for example --norm linf --eps 8/255"
        ) from error


def _images(
    spec: str | dict[str, Any] | None, root: Path | None, n: int, seed: int, say: Callable[[str], None]
) -> tuple[ImageSet, Any]:
    if spec is None:
        raise ConfigError("nothing here says on which images to audit it", fix="give --dataset")
    images = open_dataset(spec, root).load("test")
    if images.note:
        say(images.note)
    if n > len(images):
        say(f"the data set holds {len(images)} test images; all are used")
    index = np.random.default_rng(seed).permutation(len(images))[:n]
    return images.take(index), index


def _finished(ask: Ask) -> AuditResult:
    """What a finished audit found, if resuming is asked for and it is the same audit."""
    folder = ask.folder
    if ask.resume and ask.save_kit:
        what = "this audit is finished, and keeps only the strongest image of each: too little for a kit"
        raise ArtifactError(what, where=str(folder), fix="audit again with --save-kit and another --output")
    if not ask.resume:
        raise ArtifactError("a finished audit is here already", where=str(folder), fix="choose another --output, or delete it")
    try:
        text = Bundle.open(folder, kind="audit").file("result.json").read_bytes()
        result = AuditResult.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError("result.json is damaged", where=str(folder), fix="delete the folder and audit again") from error
    wanted = {**ask.policy.model_dump(), "bounds": bounds_told(ask.policy.gates, ask.config)}
    same = (result.artifact.sha256, result.threat, result.seed) == (ask.subject.facts.sha256, ask.threat, ask.seed)
    same &= ask.runtime in (None, result.artifact.runtime)
    if not same or result.policy != wanted:
        raise ArtifactError("another audit is here", where=str(folder), fix="choose another --output")
    return result


def _line(event: Event) -> str:
    if event.kind == "warning":
        return f"warning: {event.text}"
    left = f", robust so far {100 * event.robust_accuracy:.1f} %" if event.robust_accuracy is not None else ""
    return f"{event.text}: {event.done} of {event.total} images{left}"
