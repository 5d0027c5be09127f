"""An ONNX file becomes a plan with its sidecar, in the folder of a bundle that is being made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustkd.bundle import sha256, write_atomic, write_json
from robustkd.engines._base import Engine, Images
from robustkd.engines._onnx_file import PREFIX, beyond_onnx, damaged, metadata_of, precision_of, read_model
from robustkd.engines._plan import PlanKind
from robustkd.engines._tensorrt import FAMILIES, log_of
from robustkd.engines.ort import OrtEngine
from robustkd.engines.rtx import RtxEngine
from robustkd.engines.trt import HERE, Platform, TrtEngine
from robustkd.errors import NumericsError
from robustkd.exporting.parity import Gate, Parity, compare
from robustkd.exporting.trt.builder import BatchRange, build, capabilities_of, check_options
from robustkd.exporting.trt.machine import Machine
from robustkd.exporting.trt.refusals import no_graph
from robustkd.recipe.target import Target

PLAN, TWIN = "model.engine", "model.onnx"
BATCH: BatchRange = (1, 8, 64)
IMAGES = 64
#: how far an engine's logits may be from ONNX Runtime's on the same file, as a share of their range; TensorRT rounds in
#: other places, so int8 is held by its classes instead. Targets, not measurements: no engine has run yet.
RELATIVE = {"fp32": 1e-3, "fp16": 0.03}
AGREEMENT = 0.98


class Graph(NamedTuple):
    """What the builder needs to know of an ONNX file."""

    data: bytes
    precision: str
    batch: int | None
    stated: dict[str, str]


def read_graph(file: Path) -> Graph:
    """An ONNX file with its weights inside, and what it says about itself.

    Raises:
        ArtifactError: it is missing, damaged, of an unknown opset, holds no graph, or its weights lie in another file.
    """
    import onnx

    model = read_model(file)
    if beyond := beyond_onnx(model):  # TensorRT's parser would read its operators as those of an older opset
        raise damaged(file, beyond)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise no_graph(str(file), "its weights lie in another file")
    given = [value for value in model.graph.input if value.name not in {t.name for t in model.graph.initializer}]
    shape = list(given[0].type.tensor_type.shape.dim) if len(given) == 1 else []
    if len(shape) != 4 or len(model.graph.output) != 1:
        raise no_graph(str(file), "it has not one input of images (N, C, H, W) and one output of logits")
    stated = {key.removeprefix(PREFIX): value for key, value in metadata_of(model).items() if key.startswith(PREFIX)}
    return Graph(file.read_bytes(), precision_of(model), shape[0].dim_value or None, stated)


def batch_of(target: Target, graph: Graph) -> BatchRange:
    """The batch sizes: the fixed one, the target's, or the usual ones within what the graph promises."""
    if graph.batch:
        return (graph.batch,) * 3
    if target.batch:
        return target.batch
    most = int(graph.stated["max_batch"]) if graph.stated.get("max_batch", "").isdecimal() else target.largest
    low, best, high = (min(size, most) for size in BATCH)
    return (low, best, high)


def write_engine(
    file: Path,
    folder: Path,
    target: Target,
    kind: PlanKind,
    machine: Machine,
    *,
    images: Images | None = None,
    platform: Platform = HERE,
) -> dict[str, Any]:
    """Build `model.engine`, its sidecar and `build.log` into `folder`; the facts for the manifest's `engine`.

    Args:
        file: the ONNX file in the target's precision; it should lie in `folder` too.
        folder: of the bundle being made.
        target: batch and options.
        kind: what to build with.
        machine: what is here.
        images: real images for the comparison with ONNX Runtime where the engine can run; left out, noise.
        platform: what engines need of the machine.

    Raises:
        ArtifactError: the file is no graph that an engine can be built from.
        ConfigError: an option that this kind does not have.
        RequirementError: the library is missing or refuses.
        NumericsError: the engine runs here and computes something else.
    """
    check_options(kind, target.engine)
    graph, trt = read_graph(file), platform.library(kind)
    log, batch = log_of(trt), batch_of(target, graph)
    options = target.engine
    if kind == "rtx" and target.kind == "trt" and machine.capability:  # --trt on a machine that only has RTX
        options = options.model_copy(update={"capabilities": (machine.capability,)})
    built = build(trt, log, graph.data, kind, options, batch=batch, where=file.name)
    write_atomic(folder / PLAN, built.plan)
    write_atomic(folder / "build.log", built.log.encode())
    gpu = machine.driver.gpus[0] if kind == "trt" and machine.driver.gpus else None
    facts: dict[str, Any] = {
        "kind": kind,
        "builder": FAMILIES[kind].title,
        "builder_version": str(trt.__version__),
        "capabilities": [gpu.capability] if gpu else list(options.capabilities or _default(trt)),
        "gpu": gpu._asdict() if gpu else None,
        "cuda": machine.driver.cuda,
        "batch": list(batch),
        **options.model_dump(exclude={"capabilities", "timing_cache"}),
        "onnx": {"file": file.name, "sha256": sha256(file)},
        "seconds": built.seconds,
        **verify(folder / PLAN, file, kind, machine, precision=graph.precision, images=images, platform=platform),
    }
    write_json(folder / f"{PLAN}.json", _sidecar(folder / PLAN, graph, facts))
    return facts


def _default(trt: Any) -> list[str]:
    """What RTX builds for when no GPU is named: everything it knows from sm80 on, and what comes later."""
    return [name for name in capabilities_of(trt) if name != "sm75"] + ["newer"]


def _sidecar(plan: Path, graph: Graph, facts: dict[str, Any]) -> dict[str, Any]:
    """What must be known beside a plan, whose own bytes stay untouched so that any loader reads them."""
    return {
        "schema": "robustkd.engine/1",
        "file": plan.name,
        "sha256": sha256(plan),
        "precision": graph.precision,
        "model": {key: _read(value) for key, value in sorted(graph.stated.items())},
        "engine": facts,
    }


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def verify(
    plan: Path,
    file: Path,
    kind: PlanKind,
    machine: Machine,
    *,
    precision: str,
    images: Images | None = None,
    platform: Platform = HERE,
) -> dict[str, Any]:
    """Run the plan against ONNX Runtime on the same graph: `verified`, and the parity or the reason why it was not run.

    Raises:
        NumericsError: it computes something else.
    """
    if not machine.driver.gpus:
        return {"verified": False, "reason": "no device", "parity": None}
    if kind == "rtx" and not _fits(plan, machine):
        return {"verified": False, "reason": f"it is not for this machine's {machine.capability}", "parity": None}
    opener = RtxEngine if kind == "rtx" else TrtEngine
    with OrtEngine(file) as reference, opener(plan, trust=True, platform=platform) as engine:
        real = images is not None
        seen = images if images is not None else _noise(reference)
        parity = _held(reference, engine, seen, precision, file.name)
    return {"verified": True, "reason": "", "parity": parity.model_dump(mode="json") | {"images": "real" if real else "noise"}}


def _fits(plan: Path, machine: Machine) -> bool:
    from robustkd.engines._plan import read_header

    header = read_header(plan)
    return header is None or not header.targets or machine.capability in header.targets


def _noise(engine: OrtEngine) -> Images:
    return np.random.default_rng(0).random((IMAGES, *engine.info.input_shape), dtype=np.float32)


def _held(reference: Engine, engine: Engine, images: Images, precision: str, where: str) -> Parity:
    relative = RELATIVE.get(precision)
    share = relative or 1.0
    parity = compare(reference, engine, images, gate=Gate(share, mean=share, margin=2 * share), batches=(1,))
    good = parity.ok if relative else parity.finite and parity.agreement >= AGREEMENT
    if not good:
        raise NumericsError(
            f"the engine does not compute what its graph does on {parity.n} images: largest logit difference "
            f"{parity.max_abs}, same class on {parity.agreement:.1%}",
            where=where,
            fix="build with another --precision, or report the TensorRT version and GPU",
        )
    return parity
