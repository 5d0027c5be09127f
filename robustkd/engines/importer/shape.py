"""Moving values about: shapes, slices, joins, and the small whole-number graphs that compute shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table, numbers


def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.integer("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = numbers(shape) or []
    if not node.integer("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    if wanted and wanted[0] == node.settings.batch and math.prod(wanted) != x.numel():
        wanted[0] = -1
    return x.reshape(wanted)


def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.integers("perm") or list(reversed(range(x.dim()))))


def _squeeze(node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = numbers(given) if given is not None else node.integers("axes")
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


def _unsqueeze(node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = (numbers(given) if given is not None else node.integers("axes")) or []
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(
    node: Node, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    first, last = numbers(starts) or [], numbers(ends) or []
    dims, strides = numbers(axes) or list(range(len(first))), numbers(steps) or [1] * len(first)
    for start, end, dim, step in zip(first, last, dims, strides, strict=True):
        picked = range(*slice(start, end if step > 0 or end >= -x.shape[dim] else None, step).indices(x.shape[dim]))
        if step > 0:
            index = [slice(None)] * x.dim()
            index[dim] = slice(picked.start, max(picked.stop, picked.start), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(dim, torch.tensor(list(picked), dtype=torch.int64, device=x.device))
    return x


def _split(node: Node, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, parts = node.integer("axis", 0), len(node.outputs)
    sizes = numbers(given) if given is not None else node.integers("split")
    if sizes is None:
        each = -(-x.shape[axis] // parts)
        sizes = [min(each, x.shape[axis] - i * each) for i in range(parts)]
    return torch.split_with_sizes(x, sizes, axis)


def _gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.integer("axis", 0) % x.dim()
    where = indices.long()
    where = torch.where(where < 0, where + x.shape[axis], where)
    found = x.index_select(axis, where.flatten())
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = numbers(shape) or []
    rank = max(len(wanted), x.dim())
    mine, other = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    return x.expand([a if b == 1 else b for a, b in zip(mine, other, strict=True)])


def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[node.integer("start", 0) : node.attributes.get("end")], dtype=torch.int64)


def _fill(node: Node, shape: Tensor) -> Tensor:
    value = node.attributes.get("value", torch.zeros(1))
    return torch.full(numbers(shape) or [], value.item(), dtype=value.dtype)


def _range(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = node.integer("blocksize", 1)
    if node.text("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = node.integer("blocksize", 1)
    x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b**2, h // b, w // b)


def _one_hot(node: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth.item()), node.integer("axis", -1)
    where = indices.long()
    where = torch.where(where < 0, where + count, where)
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    view = [1] * (indices.dim() + 1)
    view[axis] = count
    hit = where.unsqueeze(axis) == torch.arange(count, device=where.device).view(view)
    return torch.where(hit, values[1], values[0])


def _dropout(node: Node, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    if training is not None and bool(training):
        raise node.refuse("training_mode true: export the network in evaluation mode")
    if len([name for name in node.outputs if name]) > 1:
        raise node.refuse("its second output, the mask")
    return x


OPERATORS: Table = {
    "Flatten": Operator(_flatten, ("axis",), moves=True),
    "Reshape": Operator(_reshape, ("allowzero",), static=(1,), moves=True),
    "Transpose": Operator(_transpose, ("perm",), moves=True),
    "Squeeze": Operator(_squeeze, ("axes",), static=(1,), moves=True),
    "Unsqueeze": Operator(_unsqueeze, ("axes",), static=(1,), moves=True),
    "Concat": Operator(lambda node, *parts: torch.cat(parts, node.integer("axis", 0)), ("axis",), moves=True),
    "Slice": Operator(_slice, static=(1, 2, 3, 4), moves=True),
    "Split": Operator(_split, ("axis", "split", "num_outputs"), static=(1,), moves=True),
    "Gather": Operator(_gather, ("axis",), moves=True),
    "Expand": Operator(_expand, static=(1,), moves=True),
    "Tile": Operator(lambda node, x, repeats: x.repeat(numbers(repeats) or []), static=(1,), moves=True),
    "Shape": Operator(_shape, ("start", "end")),
    "Size": Operator(lambda node, x: torch.tensor(x.numel())),
    "ConstantOfShape": Operator(_fill, ("value",), static=(0,)),
    "Range": Operator(_range, static=(0, 1, 2)),
    "DepthToSpace": Operator(_depth_to_space, ("blocksize", "mode"), moves=True),
    "SpaceToDepth": Operator(_space_to_depth, ("blocksize",), moves=True),
    "OneHot": Operator(_one_hot, ("axis",), static=(1,), moves=True),
    "Identity": Operator(lambda node, x: x, moves=True),
    "Dropout": Operator(_dropout, ("ratio", "seed"), static=(1, 2), moves=True),
}
