"""A TensorRT-RTX plan on the GPU of this machine: all kernels compiled before use, no CUDA graphs."""

from __future__ import annotations

from typing import ClassVar

from robustkd.engines._plan import PlanKind
from robustkd.engines.trt import TrtEngine


class RtxEngine(TrtEngine):
    """Runs an engine of TensorRT-RTX; see `TrtEngine` for arguments and errors."""

    summary: ClassVar[str] = "TensorRT-RTX engines on a GeForce or RTX GPU; not yet run on hardware by robustkd's tests"
    kind: ClassVar[PlanKind] = "rtx"


ENTRY = RtxEngine
