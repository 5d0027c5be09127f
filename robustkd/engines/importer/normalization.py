"""Normalisations, as at inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table


def _one_output(node: Node) -> None:
    if len([name for name in node.outputs if name]) > 1:
        raise node.refuse("more than one output")


def _columns(values: Tensor, x: Tensor) -> Tensor:
    """(C,) against (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _batch(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.integer("training_mode", 0):
        raise node.refuse("training_mode 1: export the network in evaluation mode")
    if not node.integer("spatial", 1):
        raise node.refuse("spatial 0")
    _one_output(node)
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.number("epsilon", 1e-5))


def _instance(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    found = F.group_norm(x, x.shape[1], None, None, node.number("epsilon", 1e-5))
    return found * _columns(scale, x) + _columns(bias, x)


def _group(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.integer("num_groups", 1)
    found = F.group_norm(x, groups, None, None, node.number("epsilon", 1e-5))
    if node.opset < 21:  # one scale for a group; since opset 21 one for a channel
        scale, bias = (value.repeat_interleave(x.shape[1] // groups) for value in (scale, bias))
    return found * _columns(scale, x) + _columns(bias, x)


def _layer(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _one_output(node)
    axis = node.integer("axis", -1) % x.dim()
    found = F.layer_norm(x, x.shape[axis:], None, None, node.number("epsilon", 1e-5)) * scale
    return found if bias is None else found + bias


def _response(node: Node, x: Tensor) -> Tensor:
    size = node.integer("size", 1)
    if size % 2 == 0:
        raise node.refuse(f"an even size, {size}")
    before = (size - 1) // 2
    squares = F.pad(x.square().movedim(1, -1), (before, size - 1 - before)).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    alpha, beta = node.number("alpha", 1e-4), node.number("beta", 0.75)
    return x / (node.number("bias", 1.0) + alpha / size * squares).pow(beta)


def _unit(node: Node, x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, node.integer("p", 2), dim=node.integer("axis", -1), keepdim=True)
    return torch.where(size > 0, x / size.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(x))


OPERATORS: Table = {
    "BatchNormalization": Operator(_batch, ("epsilon", "momentum", "training_mode", "spatial")),
    "InstanceNormalization": Operator(_instance, ("epsilon",)),
    "GroupNormalization": Operator(_group, ("epsilon", "num_groups", "stash_type")),
    "LayerNormalization": Operator(_layer, ("axis", "epsilon", "stash_type")),
    "LRN": Operator(_response, ("alpha", "beta", "bias", "size")),
    "LpNormalization": Operator(_unit, ("axis", "p")),
}
