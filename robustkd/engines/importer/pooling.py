"""Pooling, over windows and over whole planes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkd.engines.importer.convolution import padding, surround
from robustkd.engines.importer.node import Node, Operator, Table

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _Windows(NamedTuple):
    """Where the windows lie: `end` is the stated padding, `extra` what ceil_mode adds behind it."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    extra: list[int]


def _windows(node: Node, x: Tensor) -> _Windows:
    kernel = node.integers("kernel_shape") or []
    axes = len(kernel)
    if axes not in _MAX or x.dim() != axes + 2:
        raise node.refuse(f"{axes} spatial dimensions")
    if len(node.outputs) > 1:
        raise node.refuse("its second output, the indices")
    strides, dilations = node.integers("strides") or [1] * axes, node.integers("dilations") or [1] * axes
    begin, end = padding(node, x.shape[2:], kernel, strides, dilations)
    extra = [0] * axes
    if node.integer("ceil_mode", 0) and node.text("auto_pad", "NOTSET") == "NOTSET":
        for i, size in enumerate(x.shape[2:]):
            span = (kernel[i] - 1) * dilations[i] + 1
            whole = size + begin[i] + end[i]
            count = -(-(whole - span) // strides[i]) + 1
            if (count - 1) * strides[i] >= size + begin[i]:  # a window that would start in the padding behind is left out
                count -= 1
            extra[i] = max((count - 1) * strides[i] + span - whole, 0)
    return _Windows(kernel, strides, dilations, begin, end, extra)


def _both(end: list[int], extra: list[int]) -> list[int]:
    return [a + b for a, b in zip(end, extra, strict=True)]


def _max_pool(node: Node, x: Tensor) -> Tensor:
    w = _windows(node, x)
    x = surround(x, w.begin, _both(w.end, w.extra), -torch.inf)
    pooled: Tensor = _MAX[len(w.kernel)](x, w.kernel, w.strides, 0, w.dilations)
    return pooled


def _average_pool(node: Node, x: Tensor) -> Tensor:
    w = _windows(node, x)
    if any(d != 1 for d in w.dilations):
        raise node.refuse("dilations other than 1")
    pool = _AVERAGE[len(w.kernel)]
    found = pool(surround(x, w.begin, _both(w.end, w.extra)), w.kernel, w.strides)
    if not any((*w.begin, *w.end, *w.extra)):
        return found
    ones = x.new_ones((1, 1, *x.shape[2:]))  # the share of each window that counts
    if node.integer("count_include_pad", 0):
        ones = surround(ones, w.begin, w.end, 1.0)
        ones = surround(ones, [0] * len(w.kernel), w.extra)
    else:
        ones = surround(ones, w.begin, _both(w.end, w.extra))
    return found / pool(ones, w.kernel, w.strides)


def _planes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


_WINDOW = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")

OPERATORS: Table = {
    "MaxPool": Operator(_max_pool, (*_WINDOW, "storage_order"), moves=True),
    "AveragePool": Operator(_average_pool, (*_WINDOW, "count_include_pad")),
    "GlobalAveragePool": Operator(lambda node, x: x.mean(_planes(x), keepdim=True)),
    "GlobalMaxPool": Operator(lambda node, x: x.amax(_planes(x), keepdim=True), moves=True),
}
