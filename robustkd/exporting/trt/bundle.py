"""The verb of a board: an onnx bundle, or a bare ONNX file, becomes an engine bundle. Needs neither torch nor data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from robustkd.bundle import MANIFEST, Bundle, ModelInfo, create, write_atomic
from robustkd.engines._base import Images
from robustkd.engines._plan import PlanKind
from robustkd.engines.trt import HERE, Platform
from robustkd.errors import ArtifactError, ConfigError
from robustkd.exporting.trt.engine import TWIN, Graph, read_graph, write_engine
from robustkd.exporting.trt.machine import Machine, choose, this_machine
from robustkd.recipe.target import Target
from robustkd.threat import ThreatModel


def is_graph(path: Path) -> bool:
    """Whether a path is an ONNX file or an onnx bundle, which need no torch to become an engine."""
    if path.is_file():
        return path.suffix == ".onnx"
    if not (path / MANIFEST).is_file():
        return False
    return Bundle.open(path, check=False).manifest.kind == "onnx"


def own_precision(path: Path) -> list[str]:
    """The precision of an ONNX file or onnx bundle; nothing for a checkpoint.

    Raises:
        ArtifactError: the file cannot be read.
    """
    if not is_graph(path):
        return []
    file = path if path.is_file() else Bundle.open(path, kind="onnx", check=False).file(".onnx")
    return [read_graph(file).precision]


def build_bundle(
    path: Path,
    target: Target,
    output: Path | None = None,
    *,
    images: Images | None = None,
    machine: Machine | None = None,
    platform: Platform = HERE,
) -> Bundle:
    """Build the engine of an ONNX file for this machine, or for the GPUs named, into a new bundle.

    Args:
        path: an onnx bundle or a bare .onnx file; a bundle around the file is its parent.
        target: a profile of kind trt or rtx.
        output: folder that receives the bundle `<target name>`; left out, the folder the onnx bundle or the file lies in.
        images: real images for the comparison with ONNX Runtime where the engine can run.
        machine: what is here; left out, it is looked at.
        platform: what engines need of the machine.

    Raises:
        RequirementError: it cannot be built here; the fix is the command to run on the device.
        ConfigError: the target asks for another precision than the file has and than can be made here.
        ArtifactError: the file cannot be read, or the place is taken.
        NumericsError: the engine runs here and computes something else.
    """
    parent = Bundle.open(path, kind="onnx") if path.is_dir() else _around(path)
    file = parent.file(".onnx") if parent is not None and path.is_dir() else path
    graph, here = read_graph(file), machine or this_machine()
    if target.kind == "onnx":
        raise ConfigError(
            f"{target.name} is no engine", where=str(path), fix="name a checkpoint to export ONNX from, or give --trt or --rtx"
        )
    kind: PlanKind = choose(target.kind, here, precision=target.precision, place=str(path), gpus=target.gpus)
    data = _in_precision(graph, target, file)
    goal = (output or (path.resolve().parent if parent is None else parent.path.resolve().parent)) / target.name
    fields = _known(parent, graph) | {"precision": target.precision, "target": target.model_dump(mode="json")}
    with create(goal, "engine", parent=parent, **fields) as (folder, told):
        if data is None:
            shutil.copyfile(file, folder / TWIN)
        else:
            write_atomic(folder / TWIN, data)
        told["engine"] = write_engine(folder / TWIN, folder, target, kind, here, images=images, platform=platform)
    return Bundle.open(goal, kind="engine")


def _around(file: Path) -> Bundle | None:
    if not (file.parent / MANIFEST).is_file():
        return None
    bundle = Bundle.open(file.parent)
    return bundle if file.name in bundle.manifest.files and bundle.manifest.kind == "onnx" else None


def _in_precision(graph: Graph, target: Target, file: Path) -> bytes | None:
    """The graph in the target's precision, or None where it has it: fp16 can be made anywhere, int8 needs images.

    Raises:
        ConfigError: the file would have to be made anew from the checkpoint.
    """
    if graph.precision == target.precision:
        return None
    halved = {"fp32": "fp16", "int8": "int8-fp16"}
    if halved.get(graph.precision) != target.precision:
        raise ConfigError(
            f"the file is {graph.precision}, and the target {target.name} is {target.precision}",
            where=str(file),
            fix=f"give --precision {graph.precision}, or where the checkpoint is: "
            f"robustkd export CHECKPOINT --onnx --precision {target.precision}",
        )
    import onnx

    from robustkd.engines._onnx_file import PREFIX
    from robustkd.exporting.half import to_half

    model = to_half(onnx.load_from_string(graph.data), keep=target.keep_fp32)
    for entry in model.metadata_props:
        if entry.key == f"{PREFIX}precision":
            entry.value = target.precision
    return bytes(model.SerializeToString(deterministic=True))


def _known(parent: Bundle | None, graph: Graph) -> dict[str, Any]:
    """Model and threat of a file without a bundle, as far as its metadata tell."""
    if parent is not None:
        return {}
    stated, fields = graph.stated, dict[str, Any]()
    try:
        if {"classes", "input_shape"} <= set(stated):
            shape = tuple(json.loads(stated["input_shape"]))
            fields["model"] = ModelInfo(
                architecture=stated.get("architecture", "unknown"),
                classes=tuple(json.loads(stated["classes"])),
                input_shape=shape,
            )
        if "threat" in stated:
            fields["threat"] = ThreatModel.model_validate_json(stated["threat"])
    except ValueError as error:
        raise ArtifactError(
            "the metadata of the file are damaged", where=str(error).splitlines()[0], fix="export it again"
        ) from error
    return fields


def engine_target(kind: PlanKind, precision: str, **fields: Any) -> Target:
    """A profile for `--trt` and `--rtx` without a target file.

    Raises:
        ConfigError: a value is not possible.
    """
    try:
        return Target.model_validate({"name": f"{kind}-{precision}", "kind": kind, "precision": precision, **fields})
    except ValueError as error:
        raise ConfigError(str(error).splitlines()[-1], where=f"--{kind}", fix="see `robustkd export --help`") from error
