"""Target profiles: what to build for a device. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from robustkd.recipe.reading import read, validate


class Target(BaseModel, frozen=True, extra="forbid"):
    """One file of `export/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the name of the folder it is built into")
    kind: Literal["onnx", "trt", "rtx"] = "onnx"
    precision: Literal["fp32", "fp16", "int8", "int8-fp16"] = "fp32"
    opset: int = Field(20, ge=18, le=24, description="20 is the highest that TensorRT 10.3 is believed to take")
    max_batch: int = Field(1024, ge=1, description="largest batch the graph accepts")
    needs: str = Field("", description="what must be installed or present, in words")


def read_target(name: str) -> Target:
    """A shipped profile by name, or the user's own YAML file.

    Raises:
        ConfigError: there is no such profile, or it is wrong.
    """
    return validate(Target, read("target", name))
