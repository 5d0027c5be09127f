"""The verb `audit`: from a path and options to a finished audit bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from robustkd.auditing.artifact import Subject, find_source, open_subject
from robustkd.auditing.run import run_audit
from robustkd.auditing.steps import Event
from robustkd.auditing.store import locked, partial_folder
from robustkd.auditing.write import write_audit
from robustkd.bundle import MANIFEST, Bundle
from robustkd.datasets._base import ImageSet
from robustkd.datasets._open import open_dataset
from robustkd.errors import ArtifactError, ConfigError
from robustkd.recipe.policy import AuditConfig, read_policy
from robustkd.result import AuditResult
from robustkd.signals import graceful
from robustkd.threat import ThreatModel


def audit(
    artifact: Path | str | Subject,
    *,
    source: Path | str | None = None,
    dataset: str | None = None,
    data_root: Path | None = None,
    n: int | None = None,
    eps: float | str | None = None,
    norm: str | None = None,
    policy: str | None = None,
    tolerance: float | None = None,
    min_robust: float | None = None,
    min_clean: float | None = None,
    seed: int = 0,
    resume: bool = False,
    output: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[AuditResult, Path]:
    """Attack an artifact itself and say whether it is good enough.

    Args:
        artifact: a bundle folder (checkpoint or onnx), a bare .onnx file, or what is open already;
            `robustkd.audit` also takes `teacher:NAME`.
        source: the checkpoint to hold it against; left out, the parent of the bundle where it is found.
        dataset: a name on the shelf, a folder or an .npz; left out, that of the bundle's recipe.
        data_root: where the data sets are.
        n: test images, the first n in an order set by `seed`.
        eps: radius on the [0, 1] scale, or "8/255"; left out, that of the bundle.
        norm: `linf` or `l2`.
        policy: `quick`, `standard`, `full`, or a path to a YAML file.
        tolerance: allowed drop against the source, in percentage points.
        min_robust: floor of robust accuracy in percent.
        min_clean: floor of clean accuracy in percent.
        seed: of the choice of images and of all attacks.
        resume: continue an interrupted audit; a finished one of the same kind is returned as it is.
        output: the audit's folder; left out, `audit` inside the bundle, `<stem>-audit` beside a bare file, or
            `teacher-NAME/audit` in the runs folder.
        progress: called with one line per finished chunk and per warning.

    Returns:
        The result and the folder of the audit bundle.

    Raises:
        ArtifactError: a file is missing, damaged, foreign, or the output is taken.
        ConfigError: the policy or a value is wrong, or a bare file came without data set or eps.
        NumericsError: source and engine do not agree at all.
        RequirementError: a package is missing.
    """
    say = progress or (lambda line: None)
    subject = artifact if isinstance(artifact, Subject) else open_subject(Path(artifact))
    recipe = subject.recipe
    config = _config(recipe, policy=policy, n=n, tolerance=tolerance, min_robust=min_robust, min_clean=min_clean)
    plan, threat = read_policy(config.policy), _threat(subject, eps, norm)
    folder = output or subject.home
    with graceful(), locked(folder):
        if (folder / MANIFEST).is_file():
            return _finished(folder, subject, threat, config, plan.model_dump(), seed, resume), folder
        if folder.exists() and any(folder.iterdir()):
            raise ArtifactError("there is something here already", where=str(folder), fix="choose another --output")
        if resume and not partial_folder(folder).is_dir():
            say("there is nothing to resume here: the audit starts from the beginning")
        images, index = _images(dataset or recipe.get("dataset"), data_root, config.n, seed, say)
        with subject.engine(images.shape) as engine:
            result, arrays = run_audit(
                engine,
                artifact=subject.facts,
                images=images,
                threat=threat,
                policy=plan,
                audit=config,
                source=find_source(subject, Path(source) if source is not None else None, say),
                twin=subject.net,
                seed=seed,
                folder=folder,
                resume=resume,
                index=index,
                progress=lambda event: say(_line(event)),
            )
        write_audit(result, arrays, folder, subject.bundle)
    return result, folder


def _config(recipe: dict[str, Any], **options: Any) -> AuditConfig:
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return AuditConfig.model_validate({**(recipe.get("audit") or {}), **given})
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


def _finished(
    folder: Path,
    subject: Subject,
    threat: ThreatModel,
    config: AuditConfig,
    policy: dict[str, Any],
    seed: int,
    resume: bool,
) -> AuditResult:
    """What a finished audit found, if resuming is asked for and it is the same audit."""
    if not resume:
        raise ArtifactError("a finished audit is here already", where=str(folder), fix="choose another --output, or delete it")
    try:
        text = Bundle.open(folder, kind="audit").file("result.json").read_bytes()
        result = AuditResult.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError("result.json is damaged", where=str(folder), fix="delete the folder and audit again") from error
    wanted = {**policy, "bounds": config.model_dump(exclude={"policy", "n"})}
    same = (result.artifact.sha256, result.threat, result.seed) == (subject.facts.sha256, threat, seed)
    if not same or result.policy != wanted:
        raise ArtifactError("another audit is here", where=str(folder), fix="choose another --output")
    return result


def _line(event: Event) -> str:
    if event.kind == "warning":
        return f"warning: {event.text}"
    left = f", robust so far {100 * event.robust_accuracy:.1f} %" if event.robust_accuracy is not None else ""
    return f"{event.text}: {event.done} of {event.total} images{left}"
