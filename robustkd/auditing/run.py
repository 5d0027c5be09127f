"""One audit: probes, attacks in chunks that survive a kill, checks of the evidence, statistics, verdict."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustkd.attacks._base import prepared
from robustkd.auditing import probes
from robustkd.auditing.beside import fitting, room, threads
from robustkd.auditing.closing import Means, closing_checks
from robustkd.auditing.controls import Unseen
from robustkd.auditing.corruptions import corruptions
from robustkd.auditing.effort import eps_curve
from robustkd.auditing.facts import ArtifactFacts, AuditArrays, SourceModel
from robustkd.auditing.fresh import Reopen
from robustkd.auditing.graph import NAME as TWIN
from robustkd.auditing.graph import TRANSFER, Graph, agrees, not_built
from robustkd.auditing.ladder import radius_curve
from robustkd.auditing.landscape import landscape
from robustkd.auditing.latency import latency_bounds
from robustkd.auditing.ledger import Ledger
from robustkd.auditing.plan import Step, plan, reads_labels
from robustkd.auditing.preparing import clean_answers, models_of, network_side
from robustkd.auditing.shards import ALL, Shard
from robustkd.auditing.sides import Judged, Side, engine_side, read
from robustkd.auditing.steps import Event, Job, Progress, run_step
from robustkd.auditing.stochastic import Mean, per_draw, side_of_engine
from robustkd.auditing.store import CLOCK, Store, partial_folder
from robustkd.auditing.summary import counts_of, side_of
from robustkd.auditing.verdict import BLIND, difference, judge
from robustkd.datasets._base import ImageSet
from robustkd.engines._base import Engine, Images
from robustkd.engines.pytorch import device_of
from robustkd.errors import ArtifactError
from robustkd.heap import kept
from robustkd.recipe.policy import AuditConfig, Gates, Policy, bounds_told, gates_of
from robustkd.result import Artifact, AttackResult, AuditResult, Check, Dataset, Source
from robustkd.result import Side as SideResult
from robustkd.threat import ThreatModel

#: images that set the scale of the logits
SCALE = 256
#: the piece in which a shard keeps the engine's clean answers for the merging
CLEAN = "clean-logits"
#: answers without a gradient, per image, from which a session of ONNX Runtime is worth its start
ASKED = 500


@dataclass(frozen=True)
class Order:
    """What is to be audited, and how.

    Attributes:
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
        shards: folders of finished shards to merge.
        progress: told about every finished chunk and every warning.
        graph: the file under audit as a network: the only one with gradients where there is no source, else a second.
        unseen: images of the same data that are not attacked, against which memorising shows.
        reopen: how a fresh process opens the engine; without it all is judged again in this one only.
    """

    engine: Engine
    artifact: ArtifactFacts
    images: ImageSet
    threat: ThreatModel
    policy: Policy
    audit: AuditConfig
    source: SourceModel | None = None
    twin: nn.Module | None = None
    seed: int = 0
    folder: Path | None = None
    resume: bool = False
    index: NDArray[np.int64] | None = None
    shards: tuple[Path, ...] = ()
    progress: Progress = lambda event: None
    graph: Graph | None = None
    unseen: Unseen | None = None
    reopen: Reopen | None = None

    @property
    def net(self) -> nn.Module | None:
        """The network whose gradients serve, where there is one."""
        if self.own is not None:
            return self.own
        return self.graph.net if self.graph is not None else None

    @property
    def own(self) -> nn.Module | None:
        """The artifact's own network or its source, but not its rebuilt graph."""
        return self.twin if self.twin is not None else self.source.net if self.source else None

    @property
    def second(self) -> nn.Module | None:
        """The rebuilt graph, where it gives gradients besides those of a source."""
        return self.graph.net if self.graph is not None and self.own is not None else None

    @property
    def gates(self) -> Gates:
        """What the verdict asks for."""
        return gates_of(self.policy.gates, self.audit)

    def identity(self) -> dict[str, Any]:
        """What must be equal for pieces of two runs to belong to one audit."""
        info = self.engine.info
        return {
            "artifact": self.artifact.sha256,
            "runtime": f"{info.runtime} {info.runtime_version} {info.device}",
            # an optimiser or a provider changes what an int8 file answers; the threads are chosen by the load of the moment
            "settings": {name: value for name, value in info.settings.items() if name != "threads"},
            "source": self.source.sha256 if self.source else None,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "data": self.images.sha256,
            "policy": self.policy.model_dump(exclude={"gates"}),
            "batch_size": self.audit.batch_size,
            "stochastic": self.audit.stochastic,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class _Work:
    """An audit at work: everything its attacks need, and what the checks before them found."""

    job: Job
    kind: probes.Kind
    steps: list[Step]
    checks: list[Check]
    logits: Images
    begun: float
    earlier: float

    @property
    def seconds(self) -> float:
        """So far, with those of the runs before an interruption."""
        return self.earlier + time.perf_counter() - self.begun


def run_audit(engine: Engine, **options: Any) -> tuple[AuditResult, AuditArrays]:
    """Audit an engine on some images: the worst case per image over all attacks, read off the engine itself.

    Args:
        engine: what is under audit.
        options: the other fields of `Order`.

    Raises:
        ArtifactError: images do not fit the engine, or an unfinished audit is in the way.
        NumericsError: engine and source do not agree at all on clean images.
        Interrupted: a signal asked for a stop; finished pieces are kept.
    """
    return carry_out(Order(engine, **options))


def carry_out(order: Order) -> tuple[AuditResult, AuditArrays]:
    """The whole audit of an order; see `run_audit`."""
    with _quiet(order):
        work = _begin(order, ALL)
        return _conclude(order, work, _attack(work))


def carry_out_shard(order: Order, shard: Shard) -> Store:
    """The attacks of one shard, whose pieces are in the store it returns; the errors are those of `run_audit`."""
    with _quiet(order):
        work = _begin(order, shard)
        _attack(work)
    work.job.store.put(CLEAN, {"logits": work.logits})
    return work.job.store


def _quiet(order: Order) -> ExitStack:
    """Networks in evaluation mode with frozen parameters, and as they were afterwards; freed memory is kept until then."""
    _fits(order.engine, order.images)
    quiet = ExitStack()
    quiet.enter_context(kept())
    for net in (order.twin, order.source.net if order.source else None, order.graph.net if order.graph else None):
        if net is not None:
            quiet.enter_context(prepared(net))
    return quiet


def _begin(order: Order, shard: Shard) -> _Work:
    """Clean answers and the checks before any attack: of all images, whichever the shard."""
    begun = time.perf_counter()
    place = partial_folder(order.folder) if order.folder else None
    store = Store.open(place, order.identity(), resume=order.resume, shards=order.shards)
    earlier = store.seconds()
    engine, source, threat, audit, net = order.engine, order.source, order.threat, order.audit, order.net
    x, y = order.images.floats(), order.images.labels
    one = engine_side(engine, audit.batch_size)
    judge_e = side_of_engine(engine, audit.batch_size, stochastic=True) if audit.stochastic else one
    logits = (store.get(CLEAN) or {}).get("logits")
    if logits is None:
        logits = one.logits(x)
    kind = probes.output_kind(logits)
    device = device_of(net) if net is not None else torch.device("cpu")
    judge_s = network_side(source.net, device, order.images, audit) if source else None
    own = order.own
    other = (judge_s or network_side(own, device, order.images, audit)).judge(x, y) if own is not None else None
    clean = clean_answers(judge_e, x, y, store) if audit.stochastic else read(logits, y)
    ledger = Ledger(x, threat, clean, other if source else None)
    checks = _probe(one, judge_e, x, y, logits, kind, ledger, other, order, paired=source is not None)
    checks += _twin_checks(order, one, x, y, kind)
    for check in checks:
        if check.status in ("warn", "block"):
            order.progress(Event("warning", f"{check.name}: {check.message}"))
    second = order.second if not any(check.name == TWIN and check.status != "ok" for check in checks) else None
    led: Engine = Mean(engine) if audit.stochastic else engine
    some = torch.from_numpy(x[:SCALE]).to(device)
    together = room((len(rows) for _, rows in shard.chunks(len(x), audit.batch_size)), audit.batch_size, device)
    asked = partial(threads, x=some, batch=audit.batch_size, most=together) if order.policy.answers >= ASKED else None
    prepare = partial(models_of, led, net, source, second, kind, some, random=audit.stochastic, asked=asked)
    models = prepare()
    job = Job(
        x,
        y,
        threat,
        judge_e,
        judge_s,
        models,
        ledger,
        store,
        audit.batch_size,
        order.seed,
        device,
        order.progress,
        shard,
        exact=lambda: prepare(exact=True),
        workers=fitting(models.values(), some, audit.batch_size, together),
    )
    steps, skipped = _possible(
        plan(
            order.policy,
            twin=net is not None,
            source=source is not None,
            second=second is not None,
            kind=kind,
            coarse=probes.coarse(logits),
            norm=threat.norm,
        ),
        logits.shape[1],
        threat.norm,
    )
    return _Work(job, kind, steps, [*checks, *skipped], logits, begun, earlier)


def _attack(work: _Work) -> dict[str, dict[str, AttackResult]]:
    """Run every step; what each yielded on either side."""
    report: dict[str, dict[str, AttackResult]] = {"engine": {}, "source": {}}
    for step in work.steps:
        run_step(work.job, step, work.steps, report)
        work.job.store.put(CLOCK, {"seconds": np.asarray(work.seconds)})
    return report


def _conclude(order: Order, work: _Work, report: dict[str, dict[str, AttackResult]]) -> tuple[AuditResult, AuditArrays]:
    """The checks of the evidence, the statistics and the verdict."""
    job, ledger, engine, source, images = work.job, work.job.ledger, order.engine, order.source, order.images
    means = Means(order.policy, work.kind, order.net, order.unseen, order.reopen)
    checks = sorted([*work.checks, *closing_checks(job, work.steps, means)], key=_order)
    transfer = order.own is None and any(check.name == TWIN and check.status == "warn" for check in checks)
    white_box = any(s.level == "surrogate" for s in work.steps) and not transfer
    counts = counts_of(ledger, white_box=white_box, why=TRANSFER if transfer else BLIND)
    all_checks, verdict = judge(counts, order.gates, checks, latency_bounds(engine, job.x, order.gates))
    result = AuditResult(
        artifact=Artifact(
            path=order.artifact.path,
            sha256=order.artifact.sha256,
            **engine.info.model_dump(include=set(_INFO)),
            settings=engine.info.settings,
        ),
        source=Source(path=source.path, sha256=source.sha256) if source else None,
        threat=order.threat,
        dataset=Dataset(name=images.name, split=images.split, n=len(images), sha256=images.sha256),
        policy={**order.policy.model_dump(), "bounds": bounds_told(order.policy.gates, order.audit)},
        seed=order.seed,
        seconds=work.seconds,
        engine=_engine_result(order, job, report["engine"]),
        source_model=side_of(ledger.source, report["source"]) if ledger.source else None,
        difference=difference(counts),
        checks=all_checks,
        verdict=verdict,
        eps_curve=eps_curve(job, order.policy),
        radius_curve=radius_curve(job, order.policy),
        landscape=landscape(job, order.policy, work.kind),
        corruptions=corruptions(job.engine, job.source, job.x, job.y, order.seed) if order.policy.corruptions else None,
    )
    places = np.arange(len(images)) if order.index is None else order.index
    return result, AuditArrays(job.x, job.y, places, ledger, job.store)


def _engine_result(order: Order, job: Job, attacks: dict[str, AttackResult]) -> SideResult:
    found = side_of(job.ledger.engine, attacks)
    if not order.audit.stochastic:
        return found
    return found.model_copy(update={"per_draw": per_draw(job.engine, job.x, job.ledger.worst, job.y)})


def _order(check: Check) -> tuple[bool, int]:
    """Checks by the number of the protocol; those without one last."""
    head = check.name.split()[0]
    numbered = head[0] == "S" and head[1:].isdigit()
    return (not numbered, int(head[1:]) if numbered else 0)


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


def _probe(
    one: Side,
    engine: Side,
    x: Images,
    y: NDArray[np.int64],
    logits: Images,
    kind: probes.Kind,
    ledger: Ledger,
    other: Judged | None,
    order: Order,
    *,
    paired: bool,
) -> list[Check]:
    clean = ledger.engine.clean
    declared = engine.draws if order.audit.stochastic else 0
    found = [probes.deterministic(one, x, y, logits, declared=declared), probes.batch_independent(engine, x, y)]
    found.append(probes.output(logits, clean, kind, decisions=reads_labels(order.policy, order.threat.norm)))
    if other is None:
        message = "without a source there is nothing to compare with"
        found.append(Check(name="S5 clean agreement", status="skipped", message=message))
    else:
        found.append(probes.agreement(clean, other, (order.gates.clean_drop or 0.0) / 100, paired=paired))
    found.append(probes.grey(engine, x, y))
    if (unit := probes.eps_unit(order.threat)) is not None:
        found.append(unit)
    return found


def _twin_checks(order: Order, engine: Side, x: Images, y: NDArray[np.int64], kind: probes.Kind) -> list[Check]:
    """Whether the rebuilt graph may be trusted, or why there is none."""
    if order.graph is None or order.graph.net is None:
        return not_built(order.graph, blind=order.net is None)
    return [agrees(order.graph.net, engine, x, y, order.threat, kind, order.seed)]


def _possible(steps: list[Step], classes: int, norm: str) -> tuple[list[Step], list[Check]]:
    """The steps that can run against so many classes in this norm, and a check for each that cannot."""
    obstacles = {step.name: _obstacle(step, classes, norm) for step in steps}
    skipped = [Check(name=f"attack {name}", status="skipped", message=why) for name, why in obstacles.items() if why]
    return [step for step in steps if not obstacles[step.name]], skipped


def _obstacle(step: Step, classes: int, norm: str) -> str:
    if step.attack is None:
        return ""
    return step.attack.obstacle(classes) if norm in step.attack.norms else f"it does not know the norm {norm}"
