"""The verb `bench`: artifacts by path, each timed at every batch size, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from robustkd.benchmarking.run import load, measure
from robustkd.bundle import MANIFEST, Bundle, hardware, sha256
from robustkd.engines._base import Engine
from robustkd.engines._open import open_engine
from robustkd.errors import ArtifactError
from robustkd.signals import check, graceful

BATCHES = (1, 32)
SCHEMA = "robustkd.bench/1"


def bench(
    artifacts: Sequence[Path],
    *,
    batches: Sequence[int] = BATCHES,
    threads: int | None = None,
    seconds: float = 2.0,
    warmup: int = 10,
    trust: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time artifacts in turns on this machine.

    Args:
        artifacts: bundle folders (checkpoint, onnx, engine) or bare files; the first is what the others are compared with.
        batches: batch sizes.
        threads: of each engine on a CPU; left out, OMP_NUM_THREADS or the cores this process may use.
        seconds: about how long to measure each artifact at each batch size.
        warmup: runs that are not counted.
        trust: load TensorRT engines that no manifest vouches for.
        say: called with warnings.

    Returns:
        What `robustkd bench --json` prints: `machine`, and per artifact what it is and its timings.

    Raises:
        ArtifactError: a file is missing, damaged, or no artifact; or two engines take images of different shapes.
        RequirementError: a package or a GPU is missing.
    """
    with graceful(), ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for path in artifacts:
            engines[_unused(path, engines)] = stack.enter_context(_open(path, threads, trust))
        _comparable(engines)
        _warn(engines, say)
        timings = {size: measure(engines, size, seconds=seconds, warmup=warmup, pause=check) for size in batches}
    rows = [
        {
            "artifact": name,
            **_file_facts(path),
            **engine.info.model_dump(mode="json", exclude={"input_shape", "classes"}),
            "timings": [timings[size][name].model_dump(mode="json") for size in batches],
        }
        for path, (name, engine) in zip(artifacts, engines.items(), strict=True)
    ]
    return {"schema": SCHEMA, "machine": {**hardware(), **load()}, "artifacts": rows}


def _open(path: Path, threads: int | None, trust: bool) -> Engine:
    folder = path if path.is_dir() else path.parent
    if (folder / "checkpoint" / MANIFEST).is_file() and path.is_dir() and not (path / MANIFEST).is_file():
        folder = path / "checkpoint"
    if (folder / MANIFEST).is_file() and (path.is_dir() or path.suffix == ".safetensors"):
        bundle = Bundle.open(folder)
        if bundle.manifest.kind == "checkpoint":
            return _network(bundle, threads)
    return open_engine(path, threads=threads, trust=trust)


def _network(bundle: Bundle, threads: int | None) -> Engine:
    import torch

    from robustkd.engines.pytorch import PytorchEngine
    from robustkd.models._files import load_net

    info = bundle.manifest.model
    if info is None:
        raise ArtifactError(
            "the manifest does not say what the model is", where=str(bundle.path), fix="distill it again with this version"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return PytorchEngine(load_net(bundle), input_shape=info.input_shape, classes=len(info.classes))


def _unused(path: Path, taken: dict[str, Engine]) -> str:
    name = str(path)
    while name in taken:
        name += " again"
    return name


def _comparable(engines: dict[str, Engine]) -> None:
    """Speeds of networks for different images say nothing about each other."""
    shapes = {name: engine.info.input_shape for name, engine in engines.items()}
    first, *others = shapes.items()
    for name, shape in others:
        if shape != first[1]:
            raise ArtifactError(
                f"{name} takes images of shape {shape}, {first[0]} of {first[1]}",
                where="bench",
                fix="compare artifacts for the same images, or time them one at a time",
            )


def _warn(engines: dict[str, Engine], say: Callable[[str], None]) -> None:
    busy = load()
    if busy["load_average"] is not None and busy["cores"] and busy["load_average"] > busy["cores"] / 2:
        say(f"warning: the load of this machine is {busy['load_average']:.1f} on {busy['cores']} cores; the figures suffer")
    for name, engine in engines.items():
        profile = getattr(engine, "metadata", {}).get("robustkd.int8_profile")
        if profile == "trt" and engine.info.runtime == "onnxruntime":
            say(f"warning: {name} is int8 for TensorRT, which is slow on a CPU; for CPUs export --target cpu-int8")


def _file_facts(path: Path) -> dict[str, Any]:
    """Size and digest of the file that runs."""
    suffixes = (".engine", ".onnx", ".safetensors")
    if path.is_dir():
        folder = path if (path / MANIFEST).is_file() else path / "checkpoint"
        names = Bundle.open(folder, check=False).manifest.files
        path = folder / next(n for suffix in suffixes for n in sorted(names, reverse=True) if n.endswith(suffix))
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
