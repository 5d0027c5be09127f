"""Padding by copies and resizing, axis by axis: a gather for each tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table, numbers


def _pad(node: Node, x: Tensor, given: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    pads = (numbers(given) if given is not None else node.integers("pads")) or []
    dims = [d % x.dim() for d in numbers(axes) or range(x.dim())]
    half = len(pads) // 2
    mode = node.text("mode", "constant")
    if mode == "constant":
        fill = float(value) if value is not None else node.number("value", 0.0)
        amounts = [0] * 2 * x.dim()
        for dim, before, after in zip(dims, pads[:half], pads[half:], strict=True):
            amounts[2 * (x.dim() - 1 - dim)], amounts[2 * (x.dim() - 1 - dim) + 1] = before, after
        return F.pad(x, amounts, value=fill)
    if mode not in ("edge", "reflect", "wrap"):
        raise node.refuse(f"mode {mode}")
    for dim, before, after in zip(dims, pads[:half], pads[half:], strict=True):
        if before or after:
            x = _padded(x, dim, before, after, mode)
    return x


def _padded(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    size = x.shape[dim]
    index = torch.arange(-before, size + after, device=x.device)
    if mode == "edge":
        index = index.clamp(0, size - 1)
    elif mode == "wrap":
        index = index % size
    else:
        index = index.abs()
        index = torch.where(index >= size, 2 * (size - 1) - index, index)
    return x.index_select(dim, index)


def _resize(
    node: Node, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    if node.op == "Upsample" or node.opset < 11:
        raise node.refuse("resizing before opset 11")
    mode = node.text("mode", "nearest")
    if mode not in ("nearest", "linear"):
        raise node.refuse(f"mode {mode}")
    for name, plain in (("antialias", 0), ("exclude_outside", 0), ("keep_aspect_ratio_policy", "stretch")):
        if node.attributes.get(name, plain) != plain:
            raise node.refuse(f"{name} {node.attributes[name]}")
    dims = [d % x.dim() for d in node.integers("axes") or range(x.dim())]
    wanted, factors = numbers(sizes), scales.flatten().tolist() if scales is not None and scales.numel() else None
    for i, dim in enumerate(dims):
        size = x.shape[dim]
        out = wanted[i] if wanted else int(size * factors[i]) if factors else size
        scale = factors[i] if factors and not wanted else out / size
        if out != size or scale != 1.0:
            x = _resampled(node, x, dim, out, scale, mode)
    return x


def _resampled(node: Node, x: Tensor, dim: int, out: int, scale: float, mode: str) -> Tensor:
    size = x.shape[dim]
    place = _source(node, torch.arange(out, dtype=torch.float32), size, out, scale)
    if mode == "nearest":
        index = _nearest(node, place).clamp(0, size - 1).long().to(x.device)
        return x.index_select(dim, index)
    low = place.floor()
    view = [1] * x.dim()
    view[dim] = out
    weight = (place - low).to(x.device, x.dtype).view(view)
    below, above = (x.index_select(dim, (low + i).clamp(0, size - 1).long().to(x.device)) for i in (0, 1))
    return below * (1 - weight) + above * weight


def _source(node: Node, at: Tensor, size: int, out: int, scale: float) -> Tensor:
    """Where in the input each place of the output lies; in float32, as runtimes compute it."""
    kind = node.text("coordinate_transformation_mode", "half_pixel")
    if kind == "asymmetric":
        return at / scale
    if kind == "align_corners":
        return at * (size - 1) / (out - 1) if out > 1 else torch.zeros_like(at)
    if kind == "pytorch_half_pixel" and out == 1:
        return torch.zeros_like(at)
    if kind in ("half_pixel", "pytorch_half_pixel"):
        return (at + 0.5) / scale - 0.5
    raise node.refuse(f"coordinate_transformation_mode {kind}")


def _nearest(node: Node, place: Tensor) -> Tensor:
    kind = node.text("nearest_mode", "round_prefer_floor")
    if kind == "floor":
        return place.floor()
    if kind == "ceil":
        return place.ceil()
    if kind == "round_prefer_floor":
        return (place - 0.5).ceil()
    if kind == "round_prefer_ceil":
        return (place + 0.5).floor()
    raise node.refuse(f"nearest_mode {kind}")


_RESIZE = (
    "antialias",
    "axes",
    "coordinate_transformation_mode",
    "cubic_coeff_a",
    "exclude_outside",
    "extrapolation_value",
    "keep_aspect_ratio_policy",
    "mode",
    "nearest_mode",
)

OPERATORS: Table = {
    "Pad": Operator(_pad, ("mode", "pads", "value"), static=(1, 2, 3), moves=True),
    "Resize": Operator(_resize, _RESIZE, static=(1, 2, 3)),
}
