"""From the options of `export` to target profiles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from robustkd.recipe.target import Target

GPUS = re.compile(r"sm\d+(,sm\d+)*")


def profiles_of(
    names: Sequence[str],
    kinds: Sequence[str],
    precisions: Sequence[str],
    fallback: Iterable[str],
    *,
    int8_profile: str | None,
    calibration: dict[str, Any],
    keep: Sequence[str],
    batch: str | None,
    settings: Sequence[str],
) -> list[Target]:
    """Every profile asked for: those named, and one of each kind in each precision; otherwise those of `fallback`.

    Raises:
        typer.BadParameter: an option has nothing to work on.
        ConfigError: a profile or a value is wrong.
    """
    from robustkd.recipe.target import Target, amend, read_target

    gpus = [gpu for name in names if GPUS.fullmatch(name) for gpu in name.split(",")]
    named = [read_target(name) for name in names if not GPUS.fullmatch(name)]
    if (precisions or int8_profile) and named:
        option = "--precision" if precisions else "--int8-profile"
        raise typer.BadParameter("it belongs to --onnx, --trt and --rtx; a --target states its own", param_hint=option)
    if gpus and "rtx" not in kinds:
        raise typer.BadParameter("GPUs are named for --rtx; --trt builds for the GPU of this machine", param_hint="--target")
    made = [
        amend(Target(name=_name(kind, precision, int8_profile)), **_flags(kind, precision, int8_profile, gpus))
        for kind, precision in product(kinds, precisions or [""])
    ]
    found = [*named, *made] or [read_target(name) for name in fallback]
    _useful(found, int8_profile, calibration, keep)
    told: dict[str, Any] = {"batch": batch} if batch is not None else {}
    return [amend(t, settings, **told, **_section(t, calibration, keep)) for t in found]


def _precision(kind: str, precision: str) -> str:
    return precision or ("fp32" if kind == "onnx" else "fp16")


def _name(kind: str, precision: str, int8_profile: str | None) -> str:
    wanted = _precision(kind, precision)
    return f"{kind}-{wanted}" + ("-cpu" if int8_profile == "ort-cpu" and wanted == "int8" else "")


def _flags(kind: str, precision: str, int8_profile: str | None, gpus: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": kind, "precision": _precision(kind, precision)}
    if int8_profile and fields["precision"].startswith("int8"):
        fields["int8_profile"] = int8_profile
    if kind == "rtx" and gpus:
        fields["engine"] = {"capabilities": gpus}
    return fields


def _useful(targets: Iterable[Target], int8_profile: str | None, calibration: dict[str, Any], keep: Sequence[str]) -> None:
    """Refuse an option that none of the targets has a use for."""
    if not any(t.quantized for t in targets):
        for option, given in (("--int8-profile", int8_profile), ("--calib...", calibration)):
            if given:
                raise typer.BadParameter("it is for int8: add --precision int8", param_hint=option)
    if keep and all(t.precision == "fp32" for t in targets):
        raise typer.BadParameter("everything is in float32: add --precision fp16 or int8", param_hint="--keep-fp32")


def _section(target: Target, calibration: dict[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"calibration": calibration} if target.quantized and calibration else {}
    return fields | ({"keep_fp32": [*keep]} if keep and target.precision != "fp32" else {})
