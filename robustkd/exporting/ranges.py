"""The range of every float tensor of a graph over the calibration images: what an int8 scale is made from.

Two passes over the images, so that memory does not grow with their number: the first finds smallest and largest,
the second counts values into bins between them. ONNX Runtime's own calibrators hold every activation of every
image at once, and print.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkd.engines._base import Images
from robustkd.errors import ArtifactError, NumericsError
from robustkd.recipe.target import Calibration

BINS = 8192
_BATCH = 32

Range = tuple[float, float]


@dataclass(frozen=True)
class _Probe:
    """A graph that also returns its inner tensors."""

    session: Any
    names: list[str]
    given: str | None

    def runs(self, images: Images) -> Iterator[dict[str, NDArray[np.float32]]]:
        (source,) = self.session.get_inputs()
        size = source.shape[0] if isinstance(source.shape[0], int) else _BATCH
        for first in range(0, len(images), size):
            part = images[first : first + size]
            # asked for no names, a session returns everything
            found = self.session.run(self.names, {source.name: part}) if self.names else []
            values = dict(zip(self.names, found, strict=True))
            yield values if self.given is None else {self.given: part, **values}


def measure(model: Any, images: Images, how: Calibration, names: Collection[str]) -> dict[str, Range]:
    """Smallest and largest value of each tensor named, cut to the percentile where that is the method.

    Args:
        model: the fp32 graph, with types inferred.
        images: (N, C, H, W) float32 in [0, 1].
        names: of float tensors of the graph, its input included.
        how: method and percentile. A percentile of 99.9 leaves 0.05 % of the values outside at either end.

    Raises:
        ArtifactError: there are no images, or they do not fit the graph.
        NumericsError: a tensor is NaN or infinite on some image.
    """
    _fits(model, images)
    probe = _open(model, set(names))
    ends: dict[str, Range] = {}
    for values in probe.runs(images):
        for name, array in values.items():
            low, high = float(array.min()), float(array.max())
            if not np.isfinite([low, high]).all():
                raise NumericsError(
                    "a value is NaN or infinite on a calibration image", where=name, fix="check the weights and the images"
                )
            before = ends.get(name, (low, high))
            ends[name] = (min(before[0], low), max(before[1], high))
    if how.method == "minmax":
        return ends
    counts = {name: np.zeros(BINS, np.int64) for name in ends}
    for values in probe.runs(images):
        for name, array in values.items():
            counts[name] += _binned(array, *ends[name])
    return {name: _cut(counts[name], ends[name], how.percentile) for name in ends}


def _binned(array: NDArray[np.float32], low: float, high: float) -> NDArray[np.int64]:
    """As `np.histogram` over [low, high], in a third of its time; a constant tensor is not counted."""
    if low == high:
        return np.zeros(BINS, np.int64)
    places = ((array.ravel() - np.float32(low)) * np.float32(BINS / (high - low))).astype(np.int32)
    return np.bincount(np.minimum(places, BINS - 1), minlength=BINS)


def _cut(counts: NDArray[np.int64], ends: Range, percentile: float) -> Range:
    """The range left when the same share is cut off both ends, on the edges of bins."""
    total = int(counts.sum())
    if not total:
        return ends
    share = total * (100 - percentile) / 200
    edges = np.linspace(*ends, BINS + 1)
    from_low, from_high = counts.cumsum(), counts[::-1].cumsum()
    low = int((from_low <= share).sum())
    high = BINS - int((from_high <= share).sum())
    return float(edges[low]), float(edges[max(high, low + 1)])


def _open(model: Any, names: set[str]) -> _Probe:
    import onnx

    from robustkd.engines.ort import open_session

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    there = {value.name for value in model.graph.output}
    given = model.graph.input[0].name
    inner = [value for value in model.graph.value_info if value.name in names]
    wide.graph.output.extend(inner)
    found = [value.name for value in inner] + sorted(there & names)
    session = open_session(wide.SerializeToString(), optimize=False)
    return _Probe(session, found, given if given in names else None)


def _fits(model: Any, images: Images) -> None:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    if not len(images):
        raise ArtifactError("there are no calibration images", where="--calib", fix="name a data set that holds images")
    if list(images.shape[1:]) != shape:
        raise ArtifactError(
            f"calibration images have shape {tuple(images.shape[1:])}, the model takes {tuple(shape)}",
            where="--calib",
            fix="use images of the data set the model was trained on",
        )
