"""The attacks of an audit, one after another, each in chunks that are kept as soon as they are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkd.attacks._base import Attack, Model
from robustkd.attacks._grid import on_grid
from robustkd.auditing.beside import side_by_side, untouched
from robustkd.auditing.ledger import Flags, Ledger
from robustkd.auditing.plan import Step, seed_of
from robustkd.auditing.quick import attacked
from robustkd.auditing.shards import ALL, Shard
from robustkd.auditing.sides import NO_NUMBER, Judged, Side
from robustkd.auditing.store import Store, piece_name
from robustkd.auditing.summary import yielded
from robustkd.auditing.twin import Surrogate, Values
from robustkd.engines._base import Images
from robustkd.errors import ArtifactError
from robustkd.result import AttackResult
from robustkd.threat import ThreatModel


@dataclass(frozen=True)
class Event:
    """What an audit tells whoever listens: the state of an attack, or a warning."""

    kind: Literal["attack", "warning"]
    text: str
    done: int = 0
    total: int = 0
    robust_accuracy: float | None = None


Progress = Callable[[Event], None]
Chunk = tuple[int, NDArray[np.int64]]
"""Its number, and the positions of images."""
Piece = dict[str, NDArray[Any]]
"""What a chunk of an attack yields."""


@dataclass(frozen=True)
class Job:
    """Everything the steps of one audit share: images, sides, models per kind of attack (and `exact` ones), records."""

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
    shard: Shard = ALL
    exact: Callable[[], dict[str, Model]] = dict
    workers: int = 1

    def chunks(self) -> list[Chunk]:
        """Number and positions of this shard's chunks. They are cut by position in the audit, never by what survives,
        so that a chunk meets the same batch and the same seed whoever runs it.
        """
        return self.shard.chunks(len(self.x), self.batch)

    def tensors(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images and labels of an index array, where the networks are."""
        return torch.from_numpy(self.x[index]).to(self.device), torch.from_numpy(self.y[index]).to(self.device)


def _queue(job: Job, step: Step, steps: list[Step]) -> Flags:
    """The images a step is tried on: those it can still tell something about.

    Baseline, and rounding to 8 bit: all that are right when clean, on either side. Surrogate: those no surrogate attack
    has broken (noise does not count, or noise could never be seen to be stronger). Replay: those right on the source
    that are still robust on either side. Black box: those still robust on the engine, of the first so many where the
    step has a limit. 8-bit attacks: those that no 8-bit image has broken.
    """
    engine, source = job.ledger.engine, job.ledger.source
    if step.attack is not None and step.grid:
        return engine.clean.robust & ~engine.broken(s.name for s in steps if s.grid and s.name in engine.attacks)
    if step.level == "baseline" or step.against == "pool":
        return engine.clean.robust | source.clean.robust if source else engine.clean.robust
    if step.level == "surrogate":
        before = [s.name for s in steps if s.level == "surrogate" and s.name in engine.attacks]
        return engine.clean.robust & ~engine.broken(before)
    if step.level == "replay" and source:
        return source.clean.robust & (source.robust() | engine.robust())
    return engine.robust() & engine.first(step.images)


def run_step(job: Job, step: Step, steps: list[Step], report: dict[str, dict[str, AttackResult]]) -> None:
    """Run one attack on its queue, chunk by chunk; finished chunks are taken from the store.

    Raises:
        ArtifactError: the store holds a chunk of other images.
        Interrupted: a signal asked for a stop.
    """
    wanted = _queue(job, step, steps)
    queues = [(number, rows[wanted[rows]]) for number, rows in job.chunks() if wanted[rows].any()]
    total, done = sum(len(index) for _, index in queues), 0
    job.ledger.begin(step.name)
    seconds, calls = 0.0, {"engine": 0, "source": 0}
    for piece in _pieces(job, step, steps, queues):
        _enter(job, step, piece)
        seconds += float(piece["seconds"])
        calls = {side: calls[side] + int(piece[f"calls_{side}"]) for side in calls}
        done += len(piece["index"])
        robust = float(job.ledger.engine.robust().mean()) if job.shard == ALL else None
        job.tell(Event("attack", step.name, done, total, robust))
    for side, track in (("engine", job.ledger.engine), ("source", job.ledger.source)):
        if track is not None:
            note = _limit(job, step)
            report[side][step.name] = yielded(track, step.name, step.level, calls[side], seconds, note)


def _pieces(job: Job, step: Step, steps: list[Step], queues: list[Chunk]) -> Iterator[Piece]:
    """What each chunk yields: first those that are kept already, then the others as they are finished."""
    open_chunks = []
    for number, index in queues:
        name = piece_name(step.name, number)
        piece = job.store.get(name)
        if piece is None:
            open_chunks.append((number, index))
            continue
        if not np.array_equal(piece["index"], index):
            raise ArtifactError(f"piece {name} of the interrupted audit holds other images", fix="start the audit anew")
        yield piece
    workers = min(job.workers, len(open_chunks))

    def made(chunk: Chunk) -> Piece:
        number, index = chunk
        begun = time.perf_counter()
        found = (
            _chunk(job, step, step.attack, index, seed_of(job.seed, step.name, 0 if step.attack.per_image else number))
            if step.attack
            else _round(job, steps, number, index)
        )
        piece = {**found, "seconds": np.asarray((time.perf_counter() - begun) / workers)}  # of the clock on the wall
        job.store.put(piece_name(step.name, number), piece)
        return piece

    with untouched(job.models.values(), job.seed):
        yield from side_by_side(made, open_chunks, workers)


def _limit(job: Job, step: Step) -> str:
    """What is to be known of an attack that did not look at every image."""
    limited = step.images and int(job.ledger.engine.clean.robust.sum()) > step.images
    return f"on the first {step.images} images that are right when clean, those already broken left out" if limited else ""


def pieces(job: Job, steps: list[Step]) -> Iterator[tuple[Step, Piece]]:
    """Every chunk of these steps that was attacked: with `index`, `x_adv`, and the predictions and margins of each side."""
    for step in steps:
        for number, _ in job.chunks():
            piece = job.store.get(piece_name(step.name, number))
            if piece is not None:
                yield step, piece


def _chunk(job: Job, step: Step, attack: Attack, index: NDArray[np.int64], seed: int) -> Piece:
    """Attack and judge one chunk: every image is judged on both sides (the common pool)."""
    x, y = job.tensors(index)
    model = job.models[step.against]
    found, asides = attacked(job, step.against, attack, index, seed)
    x_adv = found.x_adv.cpu().numpy()
    calls = {side: asides[side] + (len(index) if side == "engine" or job.source else 0) for side in asides}
    # a network that attacks in place of an engine of labels asks the engine nothing
    asked = model.values if isinstance(model, Surrogate) else model
    calls["engine" if isinstance(asked, Values) else "source"] += found.forwards
    on_engine = job.engine.judge(x_adv, job.y[index])
    calls["engine"] *= job.engine.draws
    on_source = None
    if job.source is not None:
        pool = x_adv
        if step.level == "baseline":  # the same draws, the worst of them as the source sees it
            drawn = attack.perturb(job.models["source"], x, y, job.threat, seed=seed)
            pool, calls["source"] = drawn.x_adv.cpu().numpy(), calls["source"] + drawn.forwards
        on_source = job.source.judge(pool, job.y[index])
    return _piece(index, x_adv, on_engine, on_source, calls)


def _round(job: Job, steps: list[Step], number: int, index: NDArray[np.int64]) -> Piece:
    """Round every image that the steps before found in a chunk to 8 bit, and judge it: the worst for each side."""
    x, _ = job.tensors(index)
    candidates = [(np.arange(len(index)), x)]
    for step in steps:
        piece = None if step.grid else job.store.get(piece_name(step.name, number))
        if piece is not None:
            rows = np.flatnonzero(np.isin(index, piece["index"]))
            own = np.searchsorted(piece["index"], index[rows])
            candidates.append((rows, torch.from_numpy(piece["x_adv"][own]).to(job.device)))
    worst = {"engine": _nothing(len(index)), "source": _nothing(len(index))}
    x_adv, calls = job.x[index].copy(), {"engine": 0, "source": 0}
    for rows, images in candidates:
        rounded = on_grid(images, x[torch.from_numpy(rows).to(job.device)], job.threat).cpu().numpy()
        for name, side in (("engine", job.engine), ("source", job.source)):
            if side is None:
                continue
            judged, calls[name] = side.judge(rounded, job.y[index[rows]]), calls[name] + side.draws * len(rows)
            lower = judged.margin < worst[name].margin[rows]
            worst[name].margin[rows[lower]] = judged.margin[lower]
            worst[name].prediction[rows[lower]] = judged.prediction[lower]
            if name == "engine":
                x_adv[rows[lower]] = rounded[lower]
    return _piece(index, x_adv, worst["engine"], worst["source"] if job.source else None, calls)


def _nothing(n: int) -> Judged:
    return Judged(np.full(n, NO_NUMBER, np.int64), np.full(n, np.inf))


def _piece(index: NDArray[np.int64], x_adv: Images, engine: Judged, source: Judged | None, calls: dict[str, int]) -> Piece:
    piece: Piece = {
        "index": index,
        "x_adv": x_adv.astype(np.float32),
        "engine_prediction": engine.prediction,
        "engine_margin": engine.margin,
        "calls_engine": np.asarray(calls["engine"]),
        "calls_source": np.asarray(calls["source"]),
    }
    if source is not None:
        piece |= {"source_prediction": source.prediction, "source_margin": source.margin}
    return piece


def _enter(job: Job, step: Step, piece: Piece) -> None:
    engine = Judged(piece["engine_prediction"], piece["engine_margin"])
    source = Judged(piece["source_prediction"], piece["source_margin"]) if "source_margin" in piece else None
    job.ledger.add(step.name, piece["index"], piece["x_adv"], engine, source)
