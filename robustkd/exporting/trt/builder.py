"""The one builder for classic TensorRT 10.3 to 11.x and for TensorRT-RTX: strongly typed, so the graph sets the precision.

Weakly typed networks, precision flags and calibrators are gone from TensorRT 11 and are not used on 10 either.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from robustkd.bundle import write_atomic
from robustkd.engines._plan import PlanKind
from robustkd.engines._tensorrt import FAMILIES, Log
from robustkd.errors import ArtifactError, ConfigError, RequirementError
from robustkd.exporting.trt.refusals import refusal, silently_wrong
from robustkd.recipe.target import EngineOptions

BatchRange = tuple[int, int, int]


class Built(NamedTuple):
    """A plan, the builder's log and the seconds it took."""

    plan: bytes
    log: str
    seconds: float


def build(
    trt: Any,
    log: Log,
    onnx: bytes,
    kind: PlanKind,
    options: EngineOptions,
    *,
    batch: BatchRange = (1, 8, 64),
    where: str = "model.onnx",
) -> Built:
    """Build a plan from the bytes of an ONNX file that holds its weights.

    Args:
        trt: the library, `tensorrt` or `tensorrt_rtx`.
        log: its logger, as `log_of` gives it.
        onnx: the graph; one input (N, C, H, W).
        kind: which of the two libraries it is.
        options: what the builder is told; its `capabilities` are for RTX, and empty for all it builds by default.
        batch: smallest, best and largest batch; of no account where the graph fixes the batch.
        where: what the messages call the graph.

    Raises:
        ConfigError: an option that this kind does not have, or a batch that the graph does not take.
        RequirementError: the library refuses the graph or an option; the message says which rule is broken.
        ArtifactError: the timing cache cannot be read or written.
    """
    check_options(kind, options)
    began = time.monotonic()
    builder = trt.Builder(log.handle)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, log, network, onnx, kind, where)
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default
    _profile(builder, network, config, batch, where)
    if kind == "rtx":
        _capabilities(trt, config, options.capabilities, where)
    else:
        _classic(trt, builder, config, options)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refusal(kind, log.errors(), where)
    if options.timing_cache is not None:
        write_atomic(Path(options.timing_cache), bytes(config.get_timing_cache().serialize()))
    return Built(bytes(plan), log.text(), round(time.monotonic() - began, 2))


def check_options(kind: PlanKind, options: EngineOptions) -> None:
    """Refuse what a kind does not have, before any work.

    Raises:
        ConfigError: an option belongs to the other kind.
    """
    title = FAMILIES[kind].title
    rtx_lacks = {
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible != "none",
        "dla": options.dla is not None,
        "timing_cache": options.timing_cache is not None,
    }
    wrong = [name for name, asked in rtx_lacks.items() if asked] if kind == "rtx" else []
    if kind == "trt" and options.capabilities:
        wrong = ["capabilities"]
    if wrong:
        raise ConfigError(
            f"{title} has no {' and no '.join(wrong)}",
            where=f"engine options for {title}",
            fix="leave it out" + ("; it builds for the GPU of this machine" if kind == "trt" else ""),
        )


def _parse(trt: Any, log: Log, network: Any, onnx: bytes, kind: PlanKind, where: str) -> None:
    parser = trt.OnnxParser(network, log.handle)
    if not parser.parse(onnx):
        said = [parser.get_error(index) for index in range(parser.num_errors)]
        node = f", node {said[0].node_name() or said[0].node_operator()}" if said else ""
        raise refusal(kind, [error.desc() for error in said] or log.errors(), f"{where}{node}")
    if network.num_inputs != 1 or network.num_outputs != 1:  # the parser takes text for an empty graph
        raise ArtifactError(
            f"the graph has {network.num_inputs} inputs and {network.num_outputs} outputs",
            where=where,
            fix="export one input of images and one output of logits",
        )
    if wrong := silently_wrong(log.warnings(), kind, where):
        raise wrong


def _profile(builder: Any, network: Any, config: Any, batch: BatchRange, where: str) -> None:
    images = network.get_input(0)
    shape = tuple(images.shape)
    if shape[0] != -1:
        return
    if -1 in shape[1:]:
        raise ArtifactError(
            f"its input {images.name} has shape {shape}: only the batch may be free",
            where=where,
            fix="export it with fixed channels, height and width",
        )
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((size, *shape[1:]) for size in batch))
    if config.add_optimization_profile(profile) < 0:
        raise ConfigError(
            f"the batch {':'.join(map(str, batch))} is not accepted", where=where, fix="for example --batch 1:8:64"
        )


def _capabilities(trt: Any, config: Any, wanted: tuple[str, ...], where: str) -> None:
    """Set the GPUs to build for; none named means what the library targets by default."""
    check_capabilities(trt, wanted, where)
    known = capabilities_of(trt)
    if wanted:
        config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not config.set_compute_capability(known[name], index):
            raise RequirementError(f"TensorRT-RTX refuses {name}", where=where, fix=f"name some of {', '.join(known)}")


def check_capabilities(trt: Any, wanted: tuple[str, ...], where: str) -> None:
    """Refuse GPUs that the installed TensorRT-RTX does not know.

    Raises:
        RequirementError: it does not know one.
    """
    known = capabilities_of(trt)
    if missing := [name for name in wanted if name not in known]:
        raise RequirementError(
            f"TensorRT-RTX {trt.__version__} cannot build for {', '.join(missing)}; it knows {', '.join(known)}",
            where=where,
            fix="name GPUs that it knows, or build with classic TensorRT on the device: `robustkd export BUNDLE --trt`",
        )


def capabilities_of(trt: Any) -> dict[str, Any]:
    """The GPUs an installed TensorRT-RTX can build for, by name as in sm86."""
    members: dict[str, Any] = dict(trt.ComputeCapability.__members__)
    return {name.lower(): value for name, value in members.items() if name.startswith("SM")}


def _classic(trt: Any, builder: Any, config: Any, options: EngineOptions) -> None:
    if options.hardware_compatible != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.upper(), None)
        if level is None:
            raise RequirementError(
                f"TensorRT {trt.__version__} has no hardware compatibility {options.hardware_compatible}",
                where="hardware_compatible",
                fix="use ampere_plus or none, or a newer TensorRT",
            )
        config.hardware_compatibility_level = level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.dla is not None:
        _dla(trt, builder, config, options.dla)
    if options.timing_cache is not None:
        _cache(config, Path(options.timing_cache))


def _dla(trt: Any, builder: Any, config: Any, core: int) -> None:
    if core >= builder.num_DLA_cores:
        raise RequirementError(
            f"there is no deep learning accelerator {core}: this machine has {builder.num_DLA_cores}",
            where="dla",
            fix="leave dla out, or build on a Jetson that has one",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)  # layers that the accelerator lacks


def _cache(config: Any, file: Path) -> None:
    try:
        held = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise ArtifactError(
            f"cannot read the timing cache: {error.strerror}", where=str(file), fix="name another file"
        ) from error
    if not config.set_timing_cache(config.create_timing_cache(held), False):
        raise ArtifactError(
            "the timing cache belongs to another GPU or TensorRT", where=str(file), fix="delete it, or name another file"
        )
