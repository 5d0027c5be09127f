"""Reductions over axes, running sums, softmax, and the index of the largest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table, numbers


def _reduce(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    def run(node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = numbers(given) if given is not None else node.integers("axes")
        if not axes and node.integer("noop_with_empty_axes", 0):
            return x
        dims = tuple(axes) if axes else tuple(range(x.dim()))
        return function(x, dims, bool(node.integer("keepdims", 1)))

    return Operator(run, ("axes", "keepdims", "noop_with_empty_axes"), static=(1,))


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    ordered = sorted((d % x.dim() for d in dims), reverse=True)
    for dim in ordered:
        x = x.prod(dim, keepdim=keep)
    return x


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def run(node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return function(x, node.integer("axis", -1))
        axis = node.integer("axis", 1) % x.dim()  # before opset 13 all dimensions from the axis on are one
        return function(x.flatten(axis), axis).reshape(x.shape)

    return Operator(run, ("axis",))


def _arg(function: Callable[[Tensor, int, bool], Tensor]) -> Operator:
    def run(node: Node, x: Tensor) -> Tensor:
        axis, keep = node.integer("axis", 0), bool(node.integer("keepdims", 1))
        if not node.integer("select_last_index", 0):
            return function(x, axis, keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)

    return Operator(run, ("axis", "keepdims", "select_last_index"))


def _cumsum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    (along,) = numbers(axis) or [0]
    backwards = bool(node.integer("reverse", 0))
    x = x.flip(along) if backwards else x
    total = x.cumsum(along)
    total = total - x if node.integer("exclusive", 0) else total
    return total.flip(along) if backwards else total


OPERATORS: Table = {
    "ReduceMean": _reduce(lambda x, dims, keep: x.mean(dims, keep)),
    "ReduceSum": _reduce(lambda x, dims, keep: x.sum(dims, keep)),
    "ReduceMax": _reduce(lambda x, dims, keep: x.amax(dims, keep)),
    "ReduceMin": _reduce(lambda x, dims, keep: x.amin(dims, keep)),
    "ReduceProd": _reduce(_product),
    "ReduceL1": _reduce(lambda x, dims, keep: x.abs().sum(dims, keep)),
    "ReduceL2": _reduce(lambda x, dims, keep: torch.linalg.vector_norm(x, dim=dims, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, dims, keep: x.square().sum(dims, keep)),
    "ReduceLogSum": _reduce(lambda x, dims, keep: x.sum(dims, keep).log()),
    "ReduceLogSumExp": _reduce(lambda x, dims, keep: torch.logsumexp(x, dims, keep)),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "CumSum": Operator(_cumsum, ("exclusive", "reverse"), static=(1,)),
    "ArgMax": _arg(lambda x, axis, keep: x.argmax(axis, keep)),
    "ArgMin": _arg(lambda x, axis, keep: x.argmin(axis, keep)),
}
