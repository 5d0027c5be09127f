"""`robustkd export`: a checkpoint to deployable files, each held against the checkpoint before it is handed over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from robustkd.cli._print import Json, emit, say

if TYPE_CHECKING:
    from robustkd.bundle import Bundle
    from robustkd.recipe.target import Target

Precision = Literal["fp32", "fp16", "int8", "int8-fp16"]


def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint bundle or its run; left out, the newest one.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="A shipped target profile or a path to your own YAML; may be repeated.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX file.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="A TensorRT engine; not built by this version.")] = False,
    rtx: Annotated[bool, typer.Option("--rtx", help="A TensorRT-RTX engine; not built by this version.")] = False,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Precision of --onnx, --trt and --rtx; this version builds fp32.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="MIN:OPT:MAX", help="Batch sizes to check and promise, for example 1:8:64.")
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
    kinds = [
        kind for kind, asked in (("onnx", onnx or bool(precision and not (trt or rtx))), ("trt", trt), ("rtx", rtx)) if asked
    ]
    if precision and target:
        raise typer.BadParameter("it belongs to --onnx, --trt and --rtx; a --target states its own", param_hint="--precision")
    sizes = _batches(batch)

    from robustkd.api import export as build
    from robustkd.exporting.verb import find_checkpoint, resolve

    profiles = resolve([*(target or ()), *(_profile(kind, precision) for kind in kinds)])
    found = find_checkpoint(checkpoint)
    say(f"checkpoint: {found}" + ("" if checkpoint else " (the newest one)"))
    if sizes:
        profiles = _promise(profiles or _of_recipe(found), sizes[-1])
    made = build(found, targets=profiles, output=output, data=data, **({"batches": sizes} if sizes else {}))
    _print(found, made, as_json=json)


def _batches(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(":")
    sizes = tuple(int(part) for part in parts if part.isdecimal())
    if len(parts) != 3 or len(sizes) != 3 or sizes[0] < 1 or sorted(sizes) != list(sizes):
        raise typer.BadParameter(f"{text!r} is not MIN:OPT:MAX, for example 1:8:64", param_hint="--batch")
    return sizes


def _profile(kind: str, precision: Precision | None) -> Target:
    from robustkd.recipe.target import Target

    wanted = precision or ("fp32" if kind == "onnx" else "fp16")
    return Target.model_validate({"name": f"{kind}-{wanted}", "kind": kind, "precision": wanted})


def _of_recipe(checkpoint: Path) -> list[Target]:
    from robustkd.bundle import Bundle
    from robustkd.exporting.verb import DEFAULT_TARGET, resolve

    recipe = Bundle.open(checkpoint, kind="checkpoint", check=False).manifest.recipe
    return resolve(recipe.get("targets") or (DEFAULT_TARGET,))


def _promise(targets: list[Target], largest: int) -> list[Target]:
    return [target.model_copy(update={"max_batch": largest}) for target in targets]


def _print(checkpoint: Path, made: list[Bundle], *, as_json: bool) -> None:
    told: dict[str, Any] = {}
    for bundle in made:
        file, extra = bundle.file(".onnx"), bundle.manifest.model_extra or {}
        told[extra["target"]["name"]] = {
            "bundle": str(bundle.path),
            "file": str(file),
            "sha256": bundle.manifest.files[file.name],
            "precision": bundle.manifest.precision,
            "parity": extra["parity"],
        }
    if as_json:
        emit({"checkpoint": str(checkpoint), "targets": told})
        return
    for name, facts in told.items():
        parity = facts["parity"]
        typer.echo(
            f"{name}: {facts['file']}\n"
            f"  same class on {parity['agreement']:.2%} of {parity['n']} test images; largest logit difference "
            f"{parity['max_abs']:.2g}, allowed {parity['tolerance']:.2g}"
        )
