"""Arithmetic, comparisons and activations, element by element."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table, present
from robustkd.engines.importer.rounding import straight


def _unary(function: Callable[[Tensor], Tensor], *, moves: bool = False) -> Operator:
    return Operator(lambda node, x: function(x), moves=moves)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(lambda node, a, b: function(a, b))


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(lambda node, *values: functools.reduce(function, present(values)))


def _step(function: Callable[[Tensor], Tensor]) -> Operator:
    return Operator(lambda node, x: straight(x, function, node.settings.rounding))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    whole = not a.is_floating_point() and not b.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def _mean(node: Node, *values: Tensor) -> Tensor:
    return functools.reduce(torch.add, values) / len(values)


def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if node.opset < 11:
        limits = (node.attributes.get("min"), node.attributes.get("max"))
        return x if limits == (None, None) else torch.clamp(x, *limits)
    return x if low is None and high is None else torch.clamp(x, low, high)


def _gelu(node: Node, x: Tensor) -> Tensor:
    kind = node.text("approximate", "none")
    if kind not in ("none", "tanh"):
        raise node.refuse(f"approximate {kind}")
    return F.gelu(x, approximate=kind)


def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, slope * x)


def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.number("alpha", 1.67326319217681884765625), node.number("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp_max(0)))


def _celu(node: Node, x: Tensor) -> Tensor:
    alpha = node.number("alpha", 1.0)
    return x.clamp_min(0) + (alpha * torch.expm1(x.clamp_max(0) / alpha))


def _thresholded(node: Node, x: Tensor) -> Tensor:
    return torch.where(x > node.number("alpha", 1.0), x, torch.zeros_like(x))


def _is_inf(node: Node, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if node.integer("detect_positive", 1):
        found |= torch.isposinf(x)
    if node.integer("detect_negative", 1):
        found |= torch.isneginf(x)
    return found


ARITHMETIC: Table = {
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(_divide),
    "Pow": Operator(lambda node, a, b: torch.pow(a, b).to(a.dtype)),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Erf": _unary(torch.erf),
    "Neg": _unary(torch.neg),
    "Abs": _unary(torch.abs),
    "Min": _variadic(torch.minimum),
    "Max": _variadic(torch.maximum),
    "Sum": _variadic(torch.add),
    "Mean": Operator(_mean),
    "Round": _step(torch.round),
    "Floor": _step(torch.floor),
    "Ceil": _step(torch.ceil),
    "Sign": _step(torch.sign),
}

COMPARISONS: Table = {
    "Equal": _binary(torch.eq),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Not": _unary(torch.logical_not),
    "IsNaN": _unary(torch.isnan),
    "IsInf": Operator(_is_inf, ("detect_positive", "detect_negative")),
    "Where": Operator(lambda node, condition, a, b: torch.where(condition, a, b), moves=True),
}

ACTIVATIONS: Table = {
    "Relu": _unary(torch.relu, moves=True),
    "Clip": Operator(_clip, ("min", "max"), moves=True),
    "LeakyRelu": Operator(lambda node, x: F.leaky_relu(x, node.number("alpha", 0.01)), ("alpha",)),
    "PRelu": Operator(_prelu),
    "Elu": Operator(lambda node, x: F.elu(x, node.number("alpha", 1.0)), ("alpha",)),
    "Selu": Operator(_selu, ("alpha", "gamma")),
    "Celu": Operator(_celu, ("alpha",)),
    "ThresholdedRelu": Operator(_thresholded, ("alpha",), moves=True),
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": Operator(
        lambda node, x: torch.clamp(node.number("alpha", 0.2) * x + node.number("beta", 0.5), 0, 1), ("alpha", "beta")
    ),
    "HardSwish": _unary(F.hardswish),
    "Swish": Operator(lambda node, x: x * torch.sigmoid(node.number("alpha", 1.0) * x), ("alpha",)),
    "Mish": _unary(F.mish),
    "Gelu": Operator(_gelu, ("approximate",)),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Tanh": _unary(torch.tanh),
}

OPERATORS: Table = {**ARITHMETIC, **COMPARISONS, **ACTIVATIONS}
