"""Target profiles: what to build for a device, and how. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from robustkd.errors import ConfigError
from robustkd.recipe.reading import Key, Source, override, read, validate

Kind = Literal["onnx", "trt", "rtx"]
Precision = Literal["fp32", "fp16", "int8", "int8-fp16"]
Int8Profile = Literal["trt", "ort-cpu"]


def parse_batch(value: Any) -> Any:
    """MIN:OPT:MAX as three numbers; anything else is left to the type.

    Raises:
        ValueError: it is text of another form, or the sizes do not ascend.
    """
    parts = value.split(":") if isinstance(value, str) else value
    if isinstance(value, int):  # YAML 1.1 reads 1:8:32 as hours, minutes and seconds
        parts = (value // 3600, value // 60 % 60, value % 60)
    sizes = [int(part) for part in parts if str(part).isdecimal()] if isinstance(parts, (list, tuple)) else []
    if len(sizes) != 3 or len(parts) != 3 or sizes[0] < 1 or sorted(sizes) != sizes:
        raise ValueError(f"{value!r} is not MIN:OPT:MAX, for example 1:8:64")
    return tuple(sizes)


Batch = Annotated[tuple[int, int, int], BeforeValidator(parse_batch)]
"""Batch sizes: the smallest, the one to be fastest at, the largest."""


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """On which images the ranges of int8 tensors are measured, and how a range follows from what was seen."""

    data: str | None = Field(None, description="name, folder or .npz; left out, the training images of the checkpoint")
    n: int = Field(512, ge=1, description="images, chosen by seed, balanced over the classes")
    method: Literal["percentile", "minmax"] = "percentile"
    percentile: float = Field(99.999, gt=50, le=100, description="share of the values that a range must hold, in percent")
    attack: bool = Field(False, description="measure on images attacked within the checkpoint's threat model")
    seed: int = Field(0, ge=0)


class EngineOptions(BaseModel, frozen=True, extra="forbid"):
    """What a TensorRT builder is told beyond the graph; ONNX targets have no use for it."""

    level: int = Field(3, ge=0, le=5, description="how long the builder searches for fast kernels")
    workspace_mib: int | None = Field(None, ge=1, description="scratch memory in MiB; left out, all of the device")
    tf32: bool = Field(False, description="round inputs of float32 products to 10 bits")
    capabilities: tuple[str, ...] = Field((), description="GPUs to build for, such as sm86; TensorRT-RTX only")
    version_compatible: bool = Field(False, description="load under later TensorRT versions too")
    hardware_compatible: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    dla: int | None = Field(None, ge=0, description="run on this deep learning accelerator of a Jetson")
    timing_cache: str | None = Field(None, description="file of measured kernels, read and written; classic TensorRT only")


class Target(BaseModel, frozen=True, extra="forbid"):
    """One file of `export/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the name of the folder it is built into")
    kind: Kind = "onnx"
    precision: Precision = "fp32"
    int8_profile: Int8Profile = Field("trt", description="whose int8: TensorRT's (symmetric) or ONNX Runtime's on a CPU")
    calibration: Calibration = Calibration()
    keep_fp32: tuple[str, ...] = Field((), description="nodes of the graph that stay in float32")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="share of images with the same class as in fp32; left out, by precision"
    )
    max_mean_difference: float | None = Field(
        None, ge=0, description="mean difference of a logit to fp32, as a share of their range; left out, by precision"
    )
    opset: int = Field(20, ge=18, le=24, description="20 is the highest that TensorRT 10.3 is believed to take")
    batch: Batch | None = Field(None, description="MIN:OPT:MAX, checked and promised; its MAX replaces max_batch")
    max_batch: int = Field(1024, ge=1, description="largest batch the graph accepts; 1 fixes it")
    engine: EngineOptions = EngineOptions()
    gpus: tuple[str, ...] = Field((), description="GPUs a TensorRT engine is meant for, such as sm87; left out, any")
    needs: str = Field("", description="what must be installed or present, in words")

    @property
    def largest(self) -> int:
        """The largest batch promised."""
        return self.batch[2] if self.batch else self.max_batch

    @property
    def quantized(self) -> bool:
        """Whether the graph holds int8."""
        return self.precision.startswith("int8")

    @model_validator(mode="after")
    def _possible(self) -> Target:
        if self.int8_profile == "ort-cpu" and self.quantized and (self.kind != "onnx" or self.precision != "int8"):
            raise ValueError("the int8 profile ort-cpu is for ONNX files of precision int8: no TensorRT reads it")
        return self


def amend(target: Target, settings: Iterable[str] = (), **fields: Any) -> Target:
    """The profile with some fields changed, as options of a command do; fields of sections are merged.

    Args:
        target: the profile.
        settings: `key.path=value`, applied last.
        **fields: new values.

    Raises:
        ConfigError: a value is wrong, or does not go with the others.
    """
    values = target.model_dump(mode="json")
    told = {key: {**values[key], **new} if isinstance(new, dict) else new for key, new in fields.items()}
    place = f"options of the command, target {target.name}"
    origins: dict[Key, str] = {(): place, **{(key,): place for key in values}}
    return _valid(override(Source({**values, **told}, origins), settings))


def read_target(name: str) -> Target:
    """A shipped profile by name, or the user's own YAML file.

    Raises:
        ConfigError: there is no such profile, or it is wrong.
    """
    return _valid(read("target", name))


def _valid(source: Source) -> Target:
    try:
        return validate(Target, source)
    except ConfigError as error:
        if error.fix:
            raise
        fix = "see `robustkd show target cpu-int8`, or `robustkd export --help`"  # values that are wrong only together
        raise ConfigError(error.what, where=error.where, fix=fix) from None
