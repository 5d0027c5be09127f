"""Convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def padding(
    node: Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial dimension, as `pads` or `auto_pad` say."""
    mode, axes = node.text("auto_pad", "NOTSET"), len(kernel)
    if mode == "NOTSET":
        pads = node.integers("pads") or [0] * 2 * axes
        return pads[:axes], pads[axes:]
    if mode == "VALID":
        return [0] * axes, [0] * axes
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.refuse(f"auto_pad {mode}")
    total = [
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less = [t // 2 for t in total]
    more = [t - v for t, v in zip(total, less, strict=True)]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def surround(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """X with a constant around its last dimensions."""
    flat = [size for pair in zip(reversed(begin), reversed(end), strict=True) for size in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    if axes not in _CONV:
        raise node.refuse(f"{axes} spatial dimensions")
    kernel = list(weight.shape[2:])
    strides, dilations = node.integers("strides") or [1] * axes, node.integers("dilations") or [1] * axes
    begin, end = padding(node, x.shape[2:], kernel, strides, dilations)
    if begin != end:
        x, begin = surround(x, begin, end), [0] * axes
    return _CONV[axes](x, weight, bias, strides, begin, dilations, node.integer("group", 1))


def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if node.integer("transA", 0) else a
    b = b.t() if node.integer("transB", 0) else b
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    product = a @ b if alpha == 1.0 else alpha * (a @ b)
    if c is None:
        return product
    return product + (c if beta == 1.0 else beta * c)


def _einsum(node: Node, *factors: Tensor) -> Tensor:
    return torch.einsum(node.text("equation", ""), *factors)


OPERATORS: Table = {
    "Conv": Operator(_conv, ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")),
    "Gemm": Operator(_gemm, ("alpha", "beta", "transA", "transB")),
    "MatMul": Operator(lambda node, a, b: torch.matmul(a, b)),
    "Einsum": Operator(_einsum, ("equation",)),
}
