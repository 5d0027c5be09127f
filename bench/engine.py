"""engine: a student through torch eager, torch.compile, ONNX Runtime and TensorRT, in turns; eager is the reference.

Case: engine/student/runtime/batch. `ours` and `reference` are median seconds of one batch, from images in memory to logits
in memory; `cpu_ms` and `cpu_ratio` are CPU time of the process, which suffers little from other work on the machine;
percentiles are in milliseconds, and left out where there are too few samples for them. Weights and calibration images
are random: speed does not depend on them, what the engines answer is not looked at here.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bench.place import HERE, Place
from bench.sizes import STUDENTS, Model
from bench.timing import Row
from robustkd.catalog import Shelf
from robustkd.engines._base import Engine
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import RobustKDError
from robustkd.exporting.calibration import Calibrated
from robustkd.exporting.precision import lower
from robustkd.exporting.to_onnx import to_onnx
from robustkd.recipe.target import Target, read_target

SHAPE, CLASSES = (3, 32, 32), 10
ROUNDS = {1: 300, 32: 60, 256: 20}
QUICK_ROUNDS = {1: 60, 32: 10, 256: 3}
QUICK_COMPILED = 32
"""The only batch size torch.compile is tried at in a quick run: each takes it longer than all other engines together."""
LEAST = {50: 1, 95: 20, 99: 100}
"""Samples without which a percentile is no more than the slowest of them."""
WARM = 2
EAGER, COMPILED = "torch-eager", "torch-compile"
TENSORRT = ("datacenter-fp16", "rtx-fp16", "rtx-int8")


class Taken(NamedTuple):
    """Seconds of one batch: on the wall, and of the process's CPU time, all threads together."""

    wall: float
    cpu: float


Made = dict[str, Engine | str]
"""An engine by name, or why there is none."""


def rows(
    *, quick: bool, place: Place = HERE, students: dict[str, Model] | None = None, rounds: dict[int, int] | None = None
) -> Iterator[Row]:
    """Every engine of every student (quick: of MobileNetV2) at every batch size."""
    models = students or {name: large for name, (large, _) in STUDENTS.items() if not quick or name == "mnv2"}
    for student, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            made = engines(model, Path(folder), place)
            yield from (
                {"case": f"engine/{student}/{name}", "left_out": why} for name, why in made.items() if isinstance(why, str)
            )
            ready = {name: engine for name, engine in made.items() if not isinstance(engine, str)}
            for batch, count in (rounds or (QUICK_ROUNDS if quick else ROUNDS)).items():
                wanted = [
                    name
                    for name in ready
                    if place.wants(f"engine/{student}/{name}/b{batch}")
                    and (name != COMPILED or batch == QUICK_COMPILED or not quick)
                ]
                if not wanted:
                    continue
                fit = {name: ready[name] for name in dict.fromkeys([EAGER, *wanted])}
                yield from _rows(f"engine/{student}", fit, batch, turns(fit, batch, count))


def engines(model: Model, folder: Path, place: Place) -> Made:
    """All engines of one network, ready to run."""
    torch.manual_seed(0)
    net: nn.Module = Shelf("models").get(model["name"])(**model).build(channels=SHAPE[0], classes=CLASSES)
    net = net.eval().requires_grad_(False)
    file = to_onnx(net, folder / "fp32.onnx", input_shape=SHAPE, classes=[str(c) for c in range(CLASSES)])
    on_device = net.to(place.device)
    made: Made = {EAGER: _torch(on_device), COMPILED: _tried(lambda: _compiled(on_device))}
    for precision in ("fp32", "fp16", "int8"):
        made[f"onnxruntime-{precision}"] = _tried(lambda precision=precision: _onnx(file, precision))  # type: ignore[misc]
    for target in TENSORRT:
        made[f"tensorrt-{target}"] = _tried(lambda target=target: _tensorrt(file, folder, target))  # type: ignore[misc]
    return made


def _tried(make: Callable[[], Engine | str]) -> Engine | str:
    try:
        return make()
    except RobustKDError as error:
        return f"{error.what}; {error.fix}" if error.fix else error.what


def _torch(net: nn.Module) -> PytorchEngine:
    return PytorchEngine(net, input_shape=SHAPE, classes=CLASSES)


def _compiled(net: nn.Module) -> Engine | str:
    """For each batch size a kernel of its own: compiled at the first batch of that size, before anything is timed."""
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler; install g++"
    return _torch(torch.compile(net, dynamic=False))  # type: ignore[arg-type]


def _onnx(fp32: Path, precision: str) -> OrtEngine:
    if precision == "fp32":
        return OrtEngine(fp32, threads=torch.get_num_threads())
    import onnx

    target = read_target("cpu-int8") if precision == "int8" else Target(name="cpu-fp16", precision="fp16")
    images = np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)
    made = lower(onnx.load(str(fp32)), target, Calibrated(images, {}) if target.quantized else None)
    file = fp32.with_name(f"{precision}.onnx")
    file.write_bytes(made.model.SerializeToString())
    return OrtEngine(file, threads=torch.get_num_threads())


def _tensorrt(fp32: Path, folder: Path, name: str) -> Engine:
    """Built here, for the GPU that is here."""
    import onnx

    from robustkd.engines._open import open_engine
    from robustkd.exporting.buildable import check_buildable
    from robustkd.exporting.trt.engine import write_engine
    from robustkd.exporting.trt.machine import this_machine

    target = read_target(name).model_copy(update={"batch": (1, 32, 256)})
    kind = check_buildable(target)
    if kind == "onnx":
        raise ValueError(f"{name} is no target of TensorRT")
    place = folder / name
    place.mkdir()
    images = np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)
    made = lower(onnx.load(str(fp32)), target, Calibrated(images, {}) if target.quantized else None)
    (place / "model.onnx").write_bytes(made.model.SerializeToString())
    write_engine(place / "model.onnx", place, target, kind, this_machine())
    return open_engine(place / "model.engine", trust=True)


def turns(engines: dict[str, Engine], batch: int, rounds: int) -> dict[str, list[Taken]]:
    """What each engine takes for one batch, one after another in every round, each after a run that is not counted.

    Threads of the engine before spin for a while on the cores that the next one is to have.
    """
    images = np.random.default_rng(0).random((batch, *SHAPE), dtype=np.float32)
    for engine in engines.values():
        for _ in range(WARM):
            engine.logits(images)
    times: dict[str, list[Taken]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            engine.logits(images)
            began, spent = time.perf_counter(), time.process_time()
            engine.logits(images)
            times[name].append(Taken(time.perf_counter() - began, time.process_time() - spent))
    return times


def _rows(case: str, engines: dict[str, Engine], batch: int, times: dict[str, list[Taken]]) -> Iterator[Row]:
    eager, eager_cpu = np.asarray(times[EAGER]).T
    for name, engine in engines.items():
        taken, cpu = np.asarray(times[name]).T
        ratios = eager / taken
        yield {
            "case": f"{case}/{name}/b{batch}",
            "ratio": float(np.median(eager) / np.median(taken)),
            "ours": float(np.median(taken)),
            "reference": float(np.median(eager)),
            "unit": "s",
            "pairs": len(taken),
            "ratio_range": [float(ratios.min()), float(ratios.max())],
            "ours_range": [float(taken.min()), float(taken.max())],
            "reference_range": [float(eager.min()), float(eager.max())],
            "cpu_ms": {"median": 1000 * float(np.median(cpu)), "least": 1000 * float(cpu.min())},
            "cpu_ratio": float(np.median(eager_cpu) / np.median(cpu)),
            "latency_ms": {f"p{p}": _percentile(taken, p) for p in LEAST},
            "images_per_s": float(batch * len(taken) / taken.sum()),
            "batch": batch,
            "engine": _told(engine),
        }


def _percentile(seconds: Any, p: int) -> float | None:
    return 1000 * float(np.percentile(seconds, p)) if len(seconds) >= LEAST[p] else None


def _told(engine: Engine) -> dict[str, Any]:
    info = engine.info
    return {"runtime": info.runtime, "version": info.runtime_version, "precision": info.precision, "device": info.device}
