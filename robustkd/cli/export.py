"""`robustkd export`: a checkpoint to deployable files, each held against the checkpoint before it is handed over."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from robustkd.cli._print import Json, emit, say
from robustkd.cli._targets import GPUS, profiles_of

if TYPE_CHECKING:
    from robustkd.bundle import Bundle


class Precision(str, Enum):
    """A Literal cannot be repeated on a command line; the values are those of `recipe.target.Precision`."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT8_FP16 = "int8-fp16"


_INT8 = "int8"


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="A checkpoint bundle or its run; left out, the newest one. For engines also an onnx bundle or file.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="A shipped target profile or your own YAML; with --rtx also GPUs: sm86,sm89. Repeatable."
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX file.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="An engine of the TensorRT of this machine.")] = False,
    rtx: Annotated[bool, typer.Option("--rtx", help="A TensorRT-RTX engine; builds without a GPU.")] = False,
    precision: Annotated[
        list[Precision] | None, typer.Option("--precision", help="Of --onnx (fp32), --trt and --rtx (fp16). Repeatable.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="MIN:OPT:MAX", help="Batch sizes to check and promise, for example 1:8:64.")
    ] = None,
    int8_profile: Annotated[
        Literal["trt", "ort-cpu"] | None,
        typer.Option("--int8-profile", help="int8 for TensorRT (default) or for ONNX Runtime on CPUs.", rich_help_panel=_INT8),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="D",
            help="Calibration images; left out, the checkpoint's training images.",
            rich_help_panel=_INT8,
        ),
    ] = None,
    calib_n: Annotated[int | None, typer.Option("--calib-n", min=1, help="How many; 512.", rich_help_panel=_INT8)] = None,
    calib_attack: Annotated[
        bool, typer.Option("--calib-attack", help="Attack them within the checkpoint's threat model.", rich_help_panel=_INT8)
    ] = False,
    calib_method: Annotated[
        Literal["percentile", "minmax"] | None,
        typer.Option("--calib-method", help="How a range follows from the values; percentile.", rich_help_panel=_INT8),
    ] = None,
    calib_seed: Annotated[
        int | None, typer.Option("--calib-seed", min=0, help="Of the choice of images; 0.", rich_help_panel=_INT8)
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option("--keep-fp32", metavar="NODE", help="A node or layer that stays in float32. Repeatable."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="Change a field of the profile: --set engine.level=5. Repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Where the data sets are; the parity check needs test images.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder that receives one bundle per target; left out, the run's.")
    ] = None,
    json: Json = False,
) -> None:
    """Turn a checkpoint into deployable files and check that each computes what the checkpoint computes.

    Without --target, --onnx, --trt or --rtx the targets of the checkpoint's recipe are built.
    """
    kinds = [kind for kind, asked in (("onnx", onnx or (precision and not (trt or rtx))), ("trt", trt), ("rtx", rtx)) if asked]
    _check_batch(batch)
    calibration = {"data": calib, "n": calib_n, "attack": calib_attack or None, "method": calib_method, "seed": calib_seed}

    from robustkd.exporting.trt.bundle import own_precision
    from robustkd.exporting.verb import export as build
    from robustkd.exporting.verb import find_checkpoint, resolve, targets_of

    given = [p.value for p in precision or []]
    if not given and checkpoint is not None and kinds and all(GPUS.fullmatch(name) for name in target or ()):
        given = own_precision(checkpoint)  # a graph stays what it is; a checkpoint becomes what is usual for its kind
    found = None if (target or kinds) else find_checkpoint(checkpoint)
    profiles = profiles_of(
        target or [],
        kinds if not target or kinds else [],
        given,
        [] if found is None else targets_of(found),
        int8_profile=int8_profile,
        calibration={key: value for key, value in calibration.items() if value is not None},
        keep=keep_fp32 or [],
        batch=batch,
        settings=settings or [],
    )
    resolve(profiles, str(checkpoint or "BUNDLE"))
    found = found or find_checkpoint(checkpoint)
    say(f"checkpoint: {found}" + ("" if checkpoint else " (the newest one)"))
    _print(found, build(found, targets=profiles, output=output, data=data), as_json=json)


def _check_batch(text: str | None) -> None:
    from robustkd.recipe.target import parse_batch

    if text is not None:
        try:
            parse_batch(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--batch") from None


def _print(checkpoint: Path, made: list[Bundle], *, as_json: bool) -> None:
    told = {(bundle.manifest.model_extra or {})["target"]["name"]: _facts(bundle) for bundle in made}
    if as_json:
        emit({"checkpoint": str(checkpoint), "targets": told})
        return
    for name, facts in told.items():
        typer.echo(f"{name}: {facts['file']} ({facts['bytes'] / 1e6:.2f} MB)")
        for line in _lines(facts):
            typer.echo(f"  {line}")


def _facts(bundle: Bundle) -> dict[str, Any]:
    extra = bundle.manifest.model_extra or {}
    file = bundle.file(".engine" if bundle.manifest.kind == "engine" else ".onnx")
    return {
        "bundle": str(bundle.path),
        "file": str(file),
        "bytes": file.stat().st_size,
        "sha256": bundle.manifest.files[file.name],
        "precision": bundle.manifest.precision,
        **{key: extra[key] for key in ("parity", "gates", "lowering", "calibration", "engine") if key in extra},
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for gate, parity in facts.get("gates", {}).items():
        if "skipped" in parity:
            lines.append(f"{gate}: skipped, {parity['skipped']}")
            continue
        lines.append(
            f"{parity['between'][1]}: same class as {parity['between'][0]} on {parity['agreement']:.2%} of {parity['n']} "
            f"test images; largest logit difference {parity['max_abs']:.2g}, allowed {parity['tolerance']:.2g}"
        )
    if calibration := facts.get("calibration"):
        attacked = "attacked " if calibration["attack"] else ""
        lines.append(f"calibrated on {calibration['n']} {attacked}images of {calibration['data']}, {calibration['method']}")
    if sensitive := facts.get("lowering", {}).get("sensitive"):
        named = ", ".join(f"{s['layer'] or s['node']} ({s['mean_abs']:.2g})" for s in sensitive)
        lines.append(f"most sensitive layers, by the mean logit difference of each alone: {named}")
    if engine := facts.get("engine"):
        verified = "verified on this GPU" if engine["verified"] else f"not verified: {engine['reason']}"
        lines.append(f"{engine['builder']} {engine['builder_version']}, {verified}")
    return lines
