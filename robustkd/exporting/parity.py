"""Hold a file against what it was made from, on real images, after every step of an export.

The gate in fp32: every logit finite, and within 1e-4 of the range of the source's logits. A correct fp32 export of the
shipped students differs by less than 1e-6 of that range, so the gate leaves room for other processors and
little for another function. The range counts as it is, also below 1, so that a barely trained network, whose
logits hardly vary, is held as tightly as a trained one; it counts as at least a hundredth of the largest logit,
below which float32 rounding alone would fail.

A lower precision moves logits by more than rounding, so its gate is wider; the mean difference is bounded too, a share of
the classes must stay, and none may change where the reference leads clearly. What correct int8 files of four trained
networks (ResNet-18, ResNet-20, MobileNetV2; both profiles, calibrated on 32 to 512 images, 1,024 test images) were seen
to need, as a share of the range: 0.10 at most, 0.0056 in the mean, a lead of 0.035 where a class changed; 96 % of the
classes stayed. The mean is what tells: a scale that is twice too large somewhere left the largest difference as it was
and the mean two to fifteen times as large. fp16: 0.0007 at most. What is too small for logits to show, such as a single
output channel that is zero, is found number by number (`held`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from robustkd.engines._base import Engine, Images, Logits
from robustkd.errors import NumericsError

RELATIVE = 1e-4
_LEAST = 0.01


class Gate(NamedTuple):
    """What a step may change.

    Attributes:
        relative: the largest difference of a logit, as a share of the range of the logits.
        agreement: the least share of images with the same class.
        mean: the mean difference, as a share of the range.
        margin: no class may change where the reference leads by more than this share of the range.
    """

    relative: float = RELATIVE
    agreement: float = 0.0
    mean: float = RELATIVE
    margin: float = 2 * RELATIVE


_INT8 = Gate(0.15, 0.92, 0.012, 0.1)
GATES = {"fp32": Gate(), "fp16": Gate(0.01, 0.99, 0.002, 0.02), "int8": _INT8, "int8-fp16": _INT8}
"""By the precision that a step leads to. In fp32 no class may flip beyond the tolerance, which says more than a share."""


class Parity(BaseModel, frozen=True, extra="forbid"):
    """How far the candidate's logits are from the reference's."""

    between: tuple[str, str] = Field(("source", "export"), description="the reference and the candidate")
    n: int = Field(description="images compared")
    batches: tuple[int, ...] = Field(description="batch sizes the candidate ran at")
    finite: bool = Field(description="every logit of both sides is a finite number")
    max_abs: float | None = Field(description="largest difference of a logit; none where a logit is not finite")
    mean_abs: float | None
    logit_range: float | None = Field(description="largest minus smallest logit of the reference")
    agreement: float = Field(description="share of images with the same class, 0 to 1")
    flips: int = Field(description="images whose class differs")
    flips_outside_margin: int = Field(description="flips where the reference leads by more than the margin")
    relative: float = Field(RELATIVE, description="the tolerance as a share of the logit range")
    tolerance: float | None = Field(description="largest difference allowed")
    mean_tolerance: float | None = Field(None, description="largest mean difference allowed")
    margin: float | None = Field(None, description="lead of the reference beyond which no class may change")
    min_agreement: float = Field(0.0, description="the least agreement allowed")
    would_pass_at: float | None = Field(description="the smallest relative tolerance that would have passed, if any")
    ok: bool


def compare(
    reference: Engine,
    candidate: Engine,
    images: Images,
    *,
    gate: Gate | None = None,
    batches: Iterable[int] = (),
    between: tuple[str, str] = ("source", "export"),
) -> Parity:
    """Compare two engines on images (N, C, H, W) in [0, 1], N at least 1.

    Args:
        reference: the source.
        candidate: the file under test.
        images: real images; noise would leave most of a network unused.
        gate: what may differ; left out, that of fp32.
        batches: further batch sizes at which the candidate must give the same answer on the first images.
        between: what the two are called.

    Raises:
        NumericsError: there are no images, or the two return different numbers of logits.
    """
    if not len(images):
        raise NumericsError("parity needs at least one image", where="images", fix="give test images of the data set")
    want, got = reference.logits(images), candidate.logits(images)
    if want.shape != got.shape:
        raise NumericsError(
            f"the source returns logits of shape {want.shape}, the export {got.shape}",
            where=candidate.info.runtime,
            fix="export the checkpoint again",
        )
    sizes = sorted({min(b, len(images)) for b in batches} | {len(images)})
    differences = np.abs(_doubles(got) - _doubles(want))
    for size in sizes[:-1]:
        again = candidate.logits(images[:size])
        differences[:size] = np.maximum(differences[:size], np.abs(_doubles(again) - _doubles(want[:size])))
    return _judge(want, got, differences, gate or Gate(), tuple(sizes), between)


def _doubles(logits: Logits) -> NDArray[np.float64]:
    """In double precision, so that a difference does not overflow; NaN where not finite, which `maximum` keeps."""
    wide = logits.astype(np.float64)
    wide[~np.isfinite(wide)] = np.nan
    return wide


def _judge(
    want: Logits, got: Logits, differences: NDArray[Any], gate: Gate, sizes: tuple[int, ...], between: tuple[str, str]
) -> Parity:
    flipped = want.argmax(1) != got.argmax(1)
    finite = bool(np.isfinite(differences).all())
    spread = float(want.max()) - float(want.min()) if finite else None
    scale = max(spread, _LEAST * float(np.abs(want).max())) if spread is not None else None
    largest = float(differences.max()) if finite else None
    tolerance, mean_tolerance, margin = (
        share * scale if scale is not None else None for share in (gate.relative, gate.mean, gate.margin)
    )
    mean = float(differences.mean()) if finite else None
    top = np.sort(want, axis=1)
    lead = top[:, -1] - top[:, -2] if want.shape[1] > 1 else np.full(len(want), np.inf)
    outside = int((flipped & (lead > margin)).sum()) if margin is not None else int(flipped.sum())
    agreement = 1 - float(flipped.mean())
    near = _within(largest, tolerance) and _within(mean, mean_tolerance) and not outside
    return Parity(
        between=between,
        n=len(want),
        batches=sizes,
        finite=finite,
        max_abs=largest,
        mean_abs=mean,
        logit_range=spread,
        agreement=agreement,
        flips=int(flipped.sum()),
        flips_outside_margin=outside,
        relative=gate.relative,
        tolerance=tolerance,
        mean_tolerance=mean_tolerance,
        margin=margin,
        min_agreement=gate.agreement,
        would_pass_at=largest / scale if largest is not None and scale else None,
        ok=near and agreement >= gate.agreement,
    )


def _within(found: float | None, allowed: float | None) -> bool:
    return found is not None and allowed is not None and found <= allowed


_MEND = "check the preprocessing inside the network, then try another opset or torch version"
_MEND_IMPORTER = "try another opset; if that does not help, the importer has a fault: report it with the file"
_MEND_PRECISION = "keep the most sensitive layers in float32 with --keep-fp32, or calibrate on other or more images"


def check(parity: Parity, *, where: str = "") -> Parity:
    """The same parity, if it passed.

    Raises:
        NumericsError: it did not, with the figures.
    """
    if parity.ok:
        return parity
    if not parity.finite:
        raise NumericsError("parity broken: logits are NaN or infinite", where=where, fix="check the checkpoint's weights")
    passing = (
        "at no relative tolerance" if parity.would_pass_at is None else f"at a relative tolerance of {parity.would_pass_at:.3g}"
    )
    mend = {("source", "export"): _MEND, ("runtime", "importer"): _MEND_IMPORTER}.get(parity.between, _MEND_PRECISION)
    raise NumericsError(
        f"parity broken between {' and '.join(parity.between)} on {parity.n} images: "
        f"largest logit difference {parity.max_abs:.3g}, allowed {parity.tolerance:.3g}; "
        f"mean {parity.mean_abs:.3g}, allowed {parity.mean_tolerance:.3g}; "
        f"{parity.flips} classes differ, {parity.flips_outside_margin} outside the margin; "
        f"same class on {parity.agreement:.1%}, wanted {parity.min_agreement:.1%}; would pass {passing}",
        where=where,
        fix=mend,
    )
