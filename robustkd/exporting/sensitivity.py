"""Which layers lose most by int8: each one quantized alone, everything else in float, against the fp32 graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from robustkd.engines._base import Images
from robustkd.exporting.graphs import layer_of, weights
from robustkd.exporting.int8 import layers, quantize
from robustkd.exporting.ranges import Range
from robustkd.recipe.target import Int8Profile

IMAGES = 64
"""Images per layer: enough to order the layers, few enough that fifty layers take seconds."""
SHOWN = 5


class Sensitivity(BaseModel, frozen=True, extra="forbid"):
    """What quantizing one layer alone does to the logits."""

    node: str
    layer: str = Field(description="the layer of the network, where the graph still says it")
    mean_abs: float = Field(description="mean difference of a logit to fp32")
    agreement: float = Field(description="share of images with the same class as in fp32")


def sensitivity(
    model: Any,
    ranges: Mapping[str, Range],
    profile: Int8Profile,
    images: Images,
    keep: tuple[str, ...] = (),
) -> list[Sensitivity]:
    """Every quantized layer by itself, the most sensitive first.

    Args:
        model: the fp32 graph, with types inferred.
        ranges: as for `int8.quantize`.
        profile: the placement.
        images: (N, C, H, W) in [0, 1]; the first `IMAGES` are used.
        keep: nodes that stay in float anyway.
    """
    from robustkd.engines.ort import open_session

    constants, some = weights(model.graph), images[:IMAGES]

    def logits(graph: Any) -> Any:
        session = open_session(graph.SerializeToString())
        given = session.get_inputs()[0]
        size = given.shape[0] if isinstance(given.shape[0], int) else len(some)
        return np.concatenate([session.run(None, {given.name: some[i : i + size]})[0] for i in range(0, len(some), size)])

    want, found = logits(model), []
    for node in layers(model, profile):
        if node.name in keep:
            continue
        got = logits(quantize(model, ranges, profile, only=[node.name], infer=False))
        found.append(
            Sensitivity(
                node=node.name,
                layer=layer_of(node, constants),
                mean_abs=float(np.abs(got.astype(np.float64) - want).mean()),
                agreement=float((got.argmax(1) == want.argmax(1)).mean()),
            )
        )
    return sorted(found, key=lambda s: -s.mean_abs)
