"""One checkpoint and one target become one `onnx` bundle: the graph, and the proof that it is the same network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from robustkd.bundle import Bundle, create, write_json
from robustkd.engines._base import Images
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import ArtifactError, RequirementError
from robustkd.exporting.parity import Parity, check, compare
from robustkd.exporting.to_onnx import to_onnx
from robustkd.models._files import load_net
from robustkd.recipe.target import Target

ODD_BATCHES = (1, 7)
"""Besides all images at once, parity runs at these, which catches a frozen batch."""


def check_buildable(target: Target) -> None:
    """Refuse what this version cannot build, before any work.

    Raises:
        RequirementError: the target is not ONNX in fp32.
    """
    if target.kind != "onnx" or target.precision != "fp32":
        raise RequirementError(
            f"this version of robustkd exports ONNX in fp32 only; {target.name} asks for {target.kind} in {target.precision}",
            where=f"target {target.name}",
            fix="use --target cpu-fp32; TensorRT's own tools can build an engine from that file on the device",
        )


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


def export_target(
    checkpoint: Bundle, target: Target, output: Path, *, images: Images, batches: Iterable[int] = ODD_BATCHES
) -> Bundle:
    """Export a checkpoint for one target into the new bundle `output`: `model.onnx` and `parity.json`.

    Args:
        checkpoint: the source.
        target: what to build.
        output: folder of the new bundle.
        images: real test images (N, C, H, W) in [0, 1] for the parity gate.
        batches: batch sizes at which the file must agree, besides all images at once.

    Raises:
        RequirementError: this version cannot build the target, or a package is missing.
        ArtifactError: the checkpoint cannot be read, or the output cannot be written.
        NumericsError: the file does not compute what the checkpoint computes; nothing is left behind.
    """
    check_buildable(target)
    source = source_engine(checkpoint)
    told = target.model_dump(mode="json")
    with create(output, "onnx", parent=checkpoint, target=told, precision=target.precision) as (folder, fields):
        file = to_onnx(
            source.net,
            folder / "model.onnx",
            input_shape=source.info.input_shape,
            classes=_classes(checkpoint),
            opset=target.opset,
            max_batch=target.max_batch,
            metadata=_facts(checkpoint, target),
        )
        parity = _parity(source, file, images, batches)
        fields["parity"] = parity.model_dump(mode="json")
        write_json(folder / "parity.json", {"schema": "robustkd.parity/1", **fields["parity"]})
    return Bundle.open(output, kind="onnx")


def _parity(source: PytorchEngine, file: Path, images: Images, batches: Iterable[int]) -> Parity:
    with OrtEngine(file) as candidate:
        return check(compare(source, candidate, images, batches=batches), where=file.name)


def _classes(checkpoint: Bundle) -> tuple[str, ...]:
    return checkpoint.manifest.model.classes if checkpoint.manifest.model else ()


def _facts(checkpoint: Bundle, target: Target) -> dict[str, str]:
    """What the file says about itself when it is found without its bundle."""
    manifest = checkpoint.manifest
    facts = {"precision": target.precision, "source": checkpoint.digest}
    if manifest.model is not None:
        facts["architecture"] = manifest.model.architecture
    if manifest.threat is not None:
        facts["threat"] = manifest.threat.model_dump_json()
    return facts
