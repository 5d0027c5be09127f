"""What the first bytes of a TensorRT plan say, read on any machine. A hint: the manifest is the source of truth.

The layout is undocumented. Bytes 0 to 3 are a tag and bytes 24 to 27 the builder's version (NVIDIA's open trtexec reads
both); the word at byte 32 of a TensorRT-RTX 1.7 plan was seen to be a mask of the GPUs it was built for.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal, NamedTuple

from robustkd.errors import ArtifactError

PlanKind = Literal["trt", "rtx"]
TAGS: dict[bytes, PlanKind] = {b"ftrt": "trt", b"vtrt": "rtx"}
SUFFIXES = (".engine", ".plan", ".trt")
SIZE = 36
_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "newer")  # bit 0, bit 1, ...; none named: 0x7e


class Header(NamedTuple):
    """Kind, version and GPUs of a plan, as its header has them."""

    kind: PlanKind
    version: str
    targets: tuple[str, ...]


def parse_header(data: bytes) -> Header | None:
    """The header of a plan, or None where the bytes are none."""
    kind = TAGS.get(data[:4])
    if kind is None or len(data) < SIZE:
        return None
    version = ".".join(map(str, data[24:28]))
    (mask,) = struct.unpack_from("<I", data, 32)
    known = kind == "rtx" and 0 < mask < 1 << len(_TARGETS)
    return Header(kind, version, tuple(t for bit, t in enumerate(_TARGETS) if mask >> bit & 1) if known else ())


def read_header(path: Path) -> Header | None:
    """The header of a file, or None where it is no plan.

    Raises:
        ArtifactError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return parse_header(stream.read(SIZE))
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path.name}: {error.strerror}", where=str(path), fix="check the path and its permissions"
        ) from error
