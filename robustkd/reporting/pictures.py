"""Triples of pictures: an image, its adversarial version, and their difference made visible. NumPy and zlib only."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustkd.reporting.inputs import Adversarial, ReportInput

LIMIT = 12
#: pixels of one picture up to which LIMIT triples are shown; larger ones get fewer, so that a page stays light
SMALL = 128 * 128


@dataclass(frozen=True)
class Triple:
    """Three pictures as data URIs, with what was asked and answered in words."""

    index: int
    clean: str
    adversarial: str
    difference: str
    label: str
    clean_answer: str
    adversarial_answer: str


@dataclass(frozen=True)
class Gallery:
    """The triples of one audit; `factor` is how much the differences are amplified, `broken` how many images broke."""

    triples: tuple[Triple, ...]
    factor: float
    broken: int
    width: int


def gallery(given: ReportInput, *, lost: bool = False) -> Gallery | None:
    """Up to twelve images that broke, the classes in turn; nothing where no images or no answers were kept.

    `lost`: only those that the source withstands (cell b of the paired table), whatever broke there as well left out.
    """
    images, answers = given.adversarial, given.predictions
    if images is None or answers is None:
        return None
    broke = [
        i
        for i, index in enumerate(images.index.tolist())
        if (a := answers.get(index)) is not None and a.clean == images.y[i] and not a.robust and _moved(images, i)
        if a.source_robust or not lost
    ]
    if not broke:
        return None
    _, _, height, width = images.x.shape
    limit = min(LIMIT, max(4, LIMIT * SMALL // (height * width)))
    chosen = _in_turn(broke, images.y)[:limit]
    factor = _factor(images, chosen, given.result.threat.eps if given.result.threat.norm == "linf" else 0.0)
    triples = tuple(_triple(given, images, i, factor) for i in chosen)
    return Gallery(triples, factor, len(broke), width)


def _moved(images: Adversarial, i: int) -> bool:
    """Whether an attack changed the image: one that was only tied when clean is kept as it was."""
    return bool((images.x_adv[i] != images.x[i]).any())


def _in_turn(positions: list[int], y: NDArray[np.int64]) -> list[int]:
    """The positions reordered so that each class appears once before any appears twice."""
    seen: dict[int, int] = {}
    keyed = []
    for i in positions:
        label = int(y[i])
        seen[label] = seen.get(label, 0) + 1
        keyed.append((seen[label], label, i))
    return [i for _, _, i in sorted(keyed)]


def _factor(images: Adversarial, chosen: list[int], eps: float) -> float:
    """The amplification that maps the largest change to the ends of the grey scale: eps for linf, else the largest seen."""
    largest = eps or float(np.abs(images.x_adv[chosen] - images.x[chosen]).max())
    return 0.5 / largest if np.isfinite(largest) and largest > 0 else 1.0


def _triple(given: ReportInput, images: Adversarial, i: int, factor: float) -> Triple:
    index = int(images.index[i])
    answer = (given.predictions or {})[index]
    x, x_adv = images.x[i], images.x_adv[i]
    return Triple(
        index=index,
        clean=picture(x),
        adversarial=picture(x_adv),
        difference=picture(0.5 + factor * (x_adv - x)),
        label=class_name(given, int(images.y[i])),
        clean_answer=class_name(given, answer.clean),
        adversarial_answer="tied" if answer.adversarial == images.y[i] else class_name(given, answer.adversarial),
    )


def class_name(given: ReportInput, number: int) -> str:
    """The name of a class where the bundle tells it, else its number; -1 is an answer that is none."""
    if number < 0:
        return "no valid answer"
    return given.classes[number] if number < len(given.classes) else f"class {number}"


def picture(image: NDArray[np.float32]) -> str:
    """A (C, H, W) image in [0, 1] as a PNG data URI: grey for one channel, colour for three, else the channels' mean."""
    if image.shape[0] not in (1, 3):
        image = image.mean(axis=0, keepdims=True)
    levels = np.rint(np.nan_to_num(image.astype(np.float64)).clip(0, 1) * 255).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(png(levels.transpose(1, 2, 0))).decode()


def png(levels: NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 1) or (H, W, 3) levels losslessly; the bytes depend on the levels alone."""
    height, width, channels = levels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), levels.reshape(height, width * channels)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
