"""One checkpoint and one target become one bundle: the graph or engine, and the proof that it is the same network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from robustkd.bundle import Bundle, create, write_atomic, write_json
from robustkd.engines._base import Images
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import ArtifactError
from robustkd.exporting.buildable import check_buildable
from robustkd.exporting.calibration import Calibrated, calibration_images
from robustkd.exporting.parity import GATES, Gate, Parity, check, compare
from robustkd.exporting.precision import Lowered, lower
from robustkd.exporting.to_onnx import to_onnx
from robustkd.models._files import load_net
from robustkd.recipe.target import Target

ODD_BATCHES = (1, 7)
"""Besides all images at once, parity runs at these where the target states no batch: it catches a frozen one."""
GRAPH = "model.onnx"


def source_engine(checkpoint: Bundle) -> PytorchEngine:
    """The network of a checkpoint bundle behind the engine contract.

    Raises:
        ArtifactError: the bundle is of another kind, or its weights do not fit.
    """
    info = checkpoint.manifest.model
    if checkpoint.manifest.kind != "checkpoint" or info is None:
        raise ArtifactError(
            f"a bundle of kind {checkpoint.manifest.kind} is not a checkpoint",
            where=str(checkpoint.path),
            fix="give the checkpoint folder of a run",
        )
    net = load_net(checkpoint)
    return PytorchEngine(net, input_shape=info.input_shape, classes=len(info.classes), precision=checkpoint.manifest.precision)


def export_target(checkpoint: Bundle, target: Target, output: Path, *, images: Images, data: Path | None = None) -> Bundle:
    """Export a checkpoint for one target into the new bundle `output`.

    It holds `model.onnx` and `parity.json`, for int8 `calibration.json` too, and for TensorRT the engine.

    Args:
        checkpoint: the source.
        target: what to build.
        output: folder of the new bundle.
        images: real test images (N, C, H, W) in [0, 1] for the parity gates.
        data: data root of the calibration images.

    Raises:
        RequirementError: the target cannot be built here, or a package is missing.
        ConfigError: the target names a node that is not there.
        ArtifactError: checkpoint or calibration images cannot be used, or the output cannot be written.
        NumericsError: a step changes what the network computes; nothing is left behind.
    """
    kind = check_buildable(target)
    source = source_engine(checkpoint)
    told = target.model_dump(mode="json")
    bundle: Literal["onnx", "engine"] = "onnx" if target.kind == "onnx" else "engine"
    with create(output, bundle, parent=checkpoint, target=told, precision=target.precision) as (folder, fields):
        gates = _graph(checkpoint, source, target, folder, fields, images, data)
        fields["parity"] = list(gates.values())[-1]
        gates["runtime-importer"] = _imported(folder / GRAPH, target, images)
        fields["gates"] = gates
        write_json(folder / "parity.json", {"schema": "robustkd.parity/1", **fields["parity"], "gates": gates})
        if kind != "onnx":
            from robustkd.exporting.trt.engine import write_engine
            from robustkd.exporting.trt.machine import this_machine

            fields["engine"] = write_engine(folder / GRAPH, folder, target, kind, this_machine(), images=images)
    return Bundle.open(output, kind=bundle)


def _graph(
    checkpoint: Bundle,
    source: PytorchEngine,
    target: Target,
    folder: Path,
    fields: dict[str, Any],
    images: Images,
    data: Path | None,
) -> dict[str, Any]:
    """Write `model.onnx` in the target's precision; the figures of every gate on the way."""
    file = to_onnx(
        source.net,
        folder / GRAPH,
        input_shape=source.info.input_shape,
        classes=_classes(checkpoint),
        opset=target.opset,
        max_batch=target.largest,
        metadata=_facts(checkpoint, target),
    )
    sizes = target.batch or ODD_BATCHES
    gates = {"source-export": _held(source, file, GATES["fp32"], images, sizes, ("source", "export"))}
    if target.precision == "fp32":
        return gates
    calibrated = None
    if target.quantized:
        calibrated = calibration_images(checkpoint, target.calibration, data=data, net=source.net)
    full = file.replace(folder / "fp32.onnx")
    made = _lowered(full, target, calibrated)
    write_atomic(file, made.model.SerializeToString(deterministic=True))
    gate = GATES[target.precision]
    if target.min_agreement is not None:
        gate = gate._replace(agreement=target.min_agreement)
    if target.max_mean_difference is not None:
        gate = gate._replace(mean=target.max_mean_difference)
    with OrtEngine(full) as reference:
        pair = ("fp32", target.precision)
        gates["-".join(pair)] = _held(reference, file, gate, images, sizes, pair)
    full.unlink()
    fields["lowering"] = made.facts
    if calibrated is not None and made.table is not None:
        fields["calibration"] = calibrated.record
        write_json(folder / "calibration.json", made.table)
    return gates


def _lowered(file: Path, target: Target, calibrated: Calibrated | None) -> Lowered:
    import onnx

    return lower(onnx.load(str(file)), target, calibrated)


def _held(
    reference: PytorchEngine | OrtEngine,
    file: Path,
    gate: Gate,
    images: Images,
    batches: Iterable[int],
    between: tuple[str, str],
) -> dict[str, Any]:
    with OrtEngine(file) as candidate:
        found: Parity = compare(reference, candidate, images, gate=gate, batches=batches, between=between)
    return check(found, where=file.name).model_dump(mode="json")


def _imported(file: Path, target: Target, images: Images) -> dict[str, Any]:
    """The rebuilt graph, through which audits find gradients, held against the runtime; why not, where it cannot be rebuilt."""
    from robustkd.engines.onnx_torch import OnnxTorchEngine

    gate = GATES[target.precision]
    try:
        twin = OnnxTorchEngine(file)
    except ArtifactError as error:  # an operator that is not covered: the file is right, only an audit of it is weaker
        return {"skipped": error.what}
    with twin, OrtEngine(file, optimize=False) as runtime:  # as written: its fusions round elsewhere
        pair = ("runtime", "importer")
        found = compare(runtime, twin, images, gate=gate, between=pair)
    return check(found, where=file.name).model_dump(mode="json")


def _classes(checkpoint: Bundle) -> tuple[str, ...]:
    return checkpoint.manifest.model.classes if checkpoint.manifest.model else ()


def _facts(checkpoint: Bundle, target: Target) -> dict[str, str]:
    """What the file says about itself when it is found without its bundle."""
    manifest = checkpoint.manifest
    facts = {"precision": "fp32", "source": checkpoint.digest}
    if manifest.model is not None:
        facts["architecture"] = manifest.model.architecture
    if manifest.threat is not None:
        facts["threat"] = manifest.threat.model_dump_json()
    return facts
