"""One audit: probes, attacks in chunks that survive a kill, checks of the evidence, statistics, verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkd.attacks._base import Model, prepared
from robustkd.auditing import evidence, probes
from robustkd.auditing.ledger import Flags, Ledger, Track
from robustkd.auditing.plan import Step, plan, seed_of
from robustkd.auditing.sides import NO_NUMBER, Judged, Side, engine_side, read, source_side
from robustkd.auditing.store import Store, partial_folder
from robustkd.auditing.twin import Values, tame, tamed
from robustkd.auditing.verdict import Counts, Pair, difference, judge
from robustkd.datasets._base import ImageSet
from robustkd.engines._base import Engine, Images
from robustkd.errors import ArtifactError
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.result import Artifact, AttackResult, AuditResult, Check, Dataset, Interval, Source
from robustkd.result import Side as SideResult
from robustkd.stats import wilson
from robustkd.threat import ThreatModel

#: images that set the scale of the logits
SCALE = 256


@dataclass(frozen=True)
class ArtifactFacts:
    """The file under audit."""

    path: str
    sha256: str


@dataclass(frozen=True)
class SourceModel:
    """The checkpoint the artifact is held against; its gradients serve as the twin's."""

    net: nn.Module
    path: str
    sha256: str


@dataclass(frozen=True)
class Event:
    """What an audit tells whoever listens: the state of an attack, or a warning."""

    kind: Literal["attack", "warning"]
    text: str
    done: int = 0
    total: int = 0
    robust_accuracy: float | None = None


Progress = Callable[[Event], None]


@dataclass(frozen=True)
class AuditArrays:
    """What the result does not hold: the images, and every answer to them."""

    x: Images
    y: NDArray[np.int64]
    index: NDArray[np.int64]
    ledger: Ledger
    store: Store


@dataclass(frozen=True)
class _Job:
    """Everything the steps of one audit share."""

    x: Images
    y: NDArray[np.int64]
    threat: ThreatModel
    engine: Side
    source: Side | None
    models: dict[str, Model]
    ledger: Ledger
    store: Store
    batch: int
    seed: int
    device: torch.device
    tell: Progress

    def tensors(self, index: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.x[index]).to(self.device), torch.from_numpy(self.y[index]).to(self.device)


def run_audit(
    engine: Engine,
    *,
    artifact: ArtifactFacts,
    images: ImageSet,
    threat: ThreatModel,
    policy: Policy,
    audit: AuditConfig,
    source: SourceModel | None = None,
    twin: nn.Module | None = None,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    index: NDArray[np.int64] | None = None,
    progress: Progress = lambda event: None,
) -> tuple[AuditResult, AuditArrays]:
    """Audit an engine on some images: the worst case per image over all attacks, read off the engine itself.

    Args:
        engine: what is under audit.
        artifact: its file.
        images: the images, all of which are used.
        threat: the ball.
        policy: which attacks run and how hard.
        audit: bounds of the verdict and batch size.
        source: the checkpoint to hold the engine against, in any mode.
        twin: the artifact's own network, where it is one; gradients come from it instead of from the source.
        seed: of all randomness.
        folder: the audit's folder-to-be; finished pieces are kept beside it until it is written.
        resume: take up an interrupted audit of the same identity.
        index: positions of the images in their data set, for the records.
        progress: told about every finished chunk and every warning.

    Raises:
        ArtifactError: images do not fit the engine, or an unfinished audit is in the way.
        NumericsError: engine and source do not agree at all on clean images.
        Interrupted: a signal asked for a stop; finished pieces are kept.
    """
    _fits(engine, images)
    with ExitStack() as quiet:
        for net in (twin, source.net if source else None):
            if net is not None:
                quiet.enter_context(prepared(net))
        return _audit(engine, artifact, images, threat, policy, audit, source, twin, seed, folder, resume, index, progress)


def _audit(
    engine: Engine,
    artifact: ArtifactFacts,
    images: ImageSet,
    threat: ThreatModel,
    policy: Policy,
    audit: AuditConfig,
    source: SourceModel | None,
    twin: nn.Module | None,
    seed: int,
    folder: Path | None,
    resume: bool,
    index: NDArray[np.int64] | None,
    progress: Progress,
) -> tuple[AuditResult, AuditArrays]:
    begun = time.perf_counter()
    store = Store.open(
        partial_folder(folder) if folder else None,
        _identity(engine, artifact, images, threat, policy, audit, source, seed),
        resume=resume,
    )
    earlier = float(clock["seconds"]) if (clock := store.get("clock")) else 0.0
    x, y = images.floats(), images.labels
    judge_e = engine_side(engine, audit.batch_size)
    logits = judge_e.logits(x)
    kind = probes.output_kind(logits)
    net = twin if twin is not None else source.net if source else None
    device = _device(net)
    judge_s = source_side(source.net, device, audit.batch_size) if source else None
    other = (judge_s or source_side(net, device, audit.batch_size)).judge(x, y) if net is not None else None
    ledger = Ledger(x, threat, read(logits, y), other if source else None)
    checks = _probe(judge_e, x, y, logits, kind, ledger, other, audit, threat, paired=source is not None)
    for check in checks:
        if check.status in ("warn", "block"):
            progress(Event("warning", f"{check.name}: {check.message}"))
    models = _models(engine, net, source, kind, torch.from_numpy(x[:SCALE]).to(device))
    job = _Job(x, y, threat, judge_e, judge_s, models, ledger, store, audit.batch_size, seed, device, progress)
    steps, skipped = _possible(plan(policy, twin=net is not None, source=source is not None), logits.shape[1])
    report: dict[str, dict[str, AttackResult]] = {"engine": {}, "source": {}}
    for step in steps:
        _run_step(job, step, steps, report)
        store.put("clock", {"seconds": np.asarray(earlier + time.perf_counter() - begun)})
    checks = [*checks, *skipped, *_evidence(job, steps, kind)]
    counts = _counts(ledger, white_box=any(s.level == "surrogate" for s in steps))
    all_checks, verdict = judge(counts, audit, checks)
    result = AuditResult(
        artifact=Artifact(
            path=artifact.path,
            sha256=artifact.sha256,
            **engine.info.model_dump(include=set(_INFO)),
            settings=engine.info.settings,
        ),
        source=Source(path=source.path, sha256=source.sha256) if source else None,
        threat=threat,
        dataset=Dataset(name=images.name, split=images.split, n=len(images), sha256=images.sha256),
        policy={**policy.model_dump(), "bounds": audit.model_dump(exclude={"policy", "n"})},
        seed=seed,
        seconds=earlier + time.perf_counter() - begun,
        engine=_side(ledger.engine, report["engine"]),
        source_model=_side(ledger.source, report["source"]) if ledger.source else None,
        difference=difference(counts),
        checks=all_checks,
        verdict=verdict,
    )
    places = np.arange(len(images)) if index is None else index
    return result, AuditArrays(x, y, places, ledger, store)


_INFO = ("runtime", "runtime_version", "precision", "device")


def _fits(engine: Engine, images: ImageSet) -> None:
    shape, classes = engine.info.input_shape, engine.info.classes
    if tuple(shape) != images.shape:
        raise ArtifactError(
            f"the engine takes images of shape {tuple(shape)}, the data set has {images.shape}",
            where=images.name,
            fix="choose the data set the model was trained on",
        )
    if int(images.labels.max()) >= classes:
        raise ArtifactError(
            f"the engine knows {classes} classes, the data set has a label {int(images.labels.max())}",
            where=images.name,
            fix="choose the data set the model was trained on",
        )


def _identity(
    engine: Engine,
    artifact: ArtifactFacts,
    images: ImageSet,
    threat: ThreatModel,
    policy: Policy,
    audit: AuditConfig,
    source: SourceModel | None,
    seed: int,
) -> dict[str, Any]:
    """What must be equal for pieces of two runs to belong to one audit."""
    return {
        "artifact": artifact.sha256,
        "runtime": f"{engine.info.runtime} {engine.info.runtime_version} {engine.info.device}",
        "source": source.sha256 if source else None,
        "norm": threat.norm,
        "eps": threat.eps,
        "data": images.sha256,
        "policy": policy.model_dump(),
        "batch_size": audit.batch_size,
        "seed": seed,
    }


def _device(net: nn.Module | None) -> torch.device:
    parameter = next(net.parameters(), None) if net is not None else None
    return parameter.device if parameter is not None else torch.device("cpu")


def _models(
    engine: Engine, net: nn.Module | None, source: SourceModel | None, kind: probes.Kind, x: Tensor
) -> dict[str, Model]:
    """What each kind of attack works on."""
    values = Values(engine, probabilities=kind == "probabilities")
    models: dict[str, Model] = {"engine": values}
    if net is not None:
        models["surrogate"] = tame(values, net, x)
    if source is not None:
        models["source"] = tamed(source.net, x)
    return models


def _probe(
    engine: Side,
    x: Images,
    y: NDArray[np.int64],
    logits: Images,
    kind: probes.Kind,
    ledger: Ledger,
    other: Judged | None,
    audit: AuditConfig,
    threat: ThreatModel,
    *,
    paired: bool,
) -> list[Check]:
    clean = ledger.engine.clean
    found = [probes.deterministic(engine, x, y, logits), probes.batch_independent(engine, x, y)]
    found.append(probes.output(logits, clean, kind))
    if other is None:
        message = "without a source there is nothing to compare with"
        found.append(Check(name="S5 clean agreement", status="skipped", message=message))
        message = "white-box, replayed and surrogate attacks need the checkpoint this was made from: give a source"
        found.append(Check(name="white-box levels", status="skipped", message=message))
    else:
        found.append(probes.agreement(clean, other, audit.tolerance / 100, paired=paired))
    found.append(probes.grey(engine, x, y))
    if (unit := probes.eps_unit(threat)) is not None:
        found.append(unit)
    return found


def _possible(steps: list[Step], classes: int) -> tuple[list[Step], list[Check]]:
    """The steps that can run against so many classes, and a check for each that cannot."""
    obstacles = {step.name: step.attack.obstacle(classes) for step in steps}
    skipped = [Check(name=f"attack {name}", status="skipped", message=why) for name, why in obstacles.items() if why]
    return [step for step in steps if not obstacles[step.name]], skipped


def _queue(job: _Job, step: Step, steps: list[Step]) -> Flags:
    """The images a step is tried on: those it can still tell something about.

    Baseline: all that are right when clean, on either side. Surrogate: those no surrogate attack has broken (noise
    does not count, or noise could never be seen to be stronger). Replay: those right on the source that are still
    robust on either side. Black box: those still robust on the engine.
    """
    engine, source = job.ledger.engine, job.ledger.source
    if step.level == "baseline":
        return engine.clean.robust | source.clean.robust if source else engine.clean.robust
    if step.level == "surrogate":
        before = [s.name for s in steps if s.level == "surrogate" and s.name in engine.attacks]
        return engine.clean.robust & ~engine.broken(before)
    if step.level == "replay" and source:
        return source.clean.robust & (source.robust() | engine.robust())
    return engine.robust()


def _run_step(job: _Job, step: Step, steps: list[Step], report: dict[str, dict[str, AttackResult]]) -> None:
    queue = np.flatnonzero(_queue(job, step, steps))
    job.ledger.begin(step.name)
    seconds, calls = 0.0, {"engine": 0, "source": 0}
    for number, first in enumerate(range(0, len(queue), job.batch)):
        index = queue[first : first + job.batch]
        name = f"{step.name.replace(':', '-')}-{number:05d}"
        piece = job.store.get(name)
        if piece is None:
            piece = _chunk(job, step, index, seed_of(job.seed, step.name, number))
            job.store.put(name, piece)
        elif not np.array_equal(piece["index"], index):
            raise ArtifactError(f"piece {name} of the interrupted audit holds other images", fix="start the audit anew")
        _enter(job, step, piece)
        seconds += float(piece["seconds"])
        calls = {side: calls[side] + int(piece[f"calls_{side}"]) for side in calls}
        robust = float(job.ledger.engine.robust().mean())
        job.tell(Event("attack", step.name, min(first + job.batch, len(queue)), len(queue), robust))
    for side, track in (("engine", job.ledger.engine), ("source", job.ledger.source)):
        if track is not None:
            report[side][step.name] = _yield(step, track, calls[side], seconds)


def _chunk(job: _Job, step: Step, index: NDArray[np.int64], seed: int) -> dict[str, NDArray[Any]]:
    """Attack and judge one chunk: every image is judged on both sides (the common pool)."""
    begun = time.perf_counter()
    x, y = job.tensors(index)
    found = step.attack.perturb(job.models[step.against], x, y, job.threat, seed=seed)
    x_adv = found.x_adv.cpu().numpy()
    calls = {"engine": len(index), "source": len(index) if job.source else 0}
    calls["source" if step.against == "source" else "engine"] += found.forwards
    on_engine = job.engine.judge(x_adv, job.y[index])
    on_source = None
    if job.source is not None:
        pool = x_adv
        if step.level == "baseline":  # the same draws, the worst of them as the source sees it
            drawn = step.attack.perturb(job.models["source"], x, y, job.threat, seed=seed)
            pool, calls["source"] = drawn.x_adv.cpu().numpy(), calls["source"] + drawn.forwards
        on_source = job.source.judge(pool, job.y[index])
    piece: dict[str, NDArray[Any]] = {
        "index": index,
        "x_adv": x_adv.astype(np.float32),
        "engine_prediction": on_engine.prediction,
        "engine_margin": on_engine.margin,
        "calls_engine": np.asarray(calls["engine"]),
        "calls_source": np.asarray(calls["source"]),
        "seconds": np.asarray(time.perf_counter() - begun),
    }
    if on_source is not None:
        piece |= {"source_prediction": on_source.prediction, "source_margin": on_source.margin}
    return piece


def _enter(job: _Job, step: Step, piece: dict[str, NDArray[Any]]) -> None:
    engine = Judged(piece["engine_prediction"], piece["engine_margin"])
    source = Judged(piece["source_prediction"], piece["source_margin"]) if "source_margin" in piece else None
    job.ledger.add(step.name, piece["index"], piece["x_adv"], engine, source)


def _yield(step: Step, track: Track, calls: int, seconds: float) -> AttackResult:
    n, left = len(track.clean.margin), int(track.robust().sum())
    low, high = wilson(left, n)
    queue = track.tried(step.name)
    broken = int((queue & track.clean.robust & ~track.attacks[step.name].robust).sum())
    return AttackResult(
        level=step.level,
        robust_accuracy=left / n,
        low=low,
        high=high,
        forward_calls=calls,
        seconds=seconds,
        images=int(queue.sum()),
        broken=broken,
    )


def _evidence(job: _Job, steps: list[Step], kind: probes.Kind) -> list[Check]:
    ledger = job.ledger
    attacked = sum(int((a.prediction == NO_NUMBER).sum()) for a in ledger.engine.attacks.values())
    found = [probes.finite(ledger.engine.clean, probes.extremes(job.engine, job.x, job.threat), attacked)]
    found += evidence.witnesses(ledger, steps)
    surrogate = job.models.get("surrogate")
    if isinstance(surrogate, nn.Module):
        x, y = job.tensors(np.flatnonzero(ledger.engine.clean.robust))
        logs = kind == "probabilities"
        found += evidence.gradients(surrogate, job.engine, x, y, job.threat, logs=logs)
    else:
        text = "no attack with gradients ran"
        found += [Check(name=name, status="skipped", message=text) for name in ("S12 gradients not zero", "S13 ascent")]
    found.append(evidence.inside(ledger, job.threat))
    found.append(evidence.rejudged(job.engine, ledger, job.x, job.y, job.batch))
    return found


def _counts(ledger: Ledger, *, white_box: bool) -> Counts:
    engine, source = ledger.engine, ledger.source
    clean, robust = engine.clean.robust, engine.robust()
    n = len(clean)
    pairs: dict[str, Pair | None] = {"clean_pair": None, "robust_pair": None}
    if source is not None:
        pairs = {
            "clean_pair": _pair(source.clean.robust, clean),
            "robust_pair": _pair(source.robust(), robust),
        }
    return Counts(n, int(clean.sum()), int(robust.sum()), **pairs, white_box=white_box)


def _pair(source: Flags, engine: Flags) -> Pair:
    return Pair(int((source & ~engine).sum()), int((engine & ~source).sum()))


def _side(track: Track, attacks: dict[str, AttackResult]) -> SideResult:
    return SideResult(clean_accuracy=_interval(track.clean.robust), robust_accuracy=_interval(track.robust()), attacks=attacks)


def _interval(flags: Flags) -> Interval:
    k, n = int(flags.sum()), len(flags)
    low, high = wilson(k, n)
    return Interval(estimate=k / n, low=low, high=high)
