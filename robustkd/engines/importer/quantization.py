"""Quantising, dequantising, and changes of type.

Levels are held as whole numbers of a floating type, so that a gradient passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustkd.engines.importer.node import Node, Operator, Table
from robustkd.engines.importer.rounding import half, quantize

_LEVELS = (torch.int8, torch.uint8, torch.int16)
#: onnx.TensorProto.DataType, which needs no import here
FLOAT16 = 10
_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    FLOAT16: torch.float32,  # rounded to half, held in fp32
    11: torch.float64,
}


def _along(node: Node, values: Tensor, x: Tensor) -> Tensor:
    """Scale or zero point against x: one for the tensor, or one for each place along the axis."""
    if values.numel() == 1:
        return values.reshape(())
    if values.dim() != 1 or node.integer("block_size", 0):
        raise node.refuse("quantisation in blocks")
    view = [1] * x.dim()
    view[node.integer("axis", 1)] = values.numel()
    return values.view(view)


def _quantize(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = zero.dtype if zero is not None else _TYPES.get(node.integer("output_dtype", 0) or 2)
    if kind not in _LEVELS:
        raise node.refuse(f"levels of type {kind}")
    limits, wide = torch.iinfo(kind), x if x.is_floating_point() else x.float()
    shift = _along(node, zero, x).to(wide.dtype) if zero is not None else wide.new_zeros(())
    return quantize(wide, _along(node, scale, x).to(wide.dtype), shift, limits.min, limits.max, node.settings.rounding)


def _dequantize(node: Node, levels: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if node.integer("output_dtype", 0) not in (0, 1, FLOAT16):
        raise node.refuse("output_dtype")
    if zero is not None:
        shift = _along(node, zero, levels)
        levels = levels.to(scale.dtype) - shift.to(scale.dtype) if levels.dtype != torch.int32 else levels - shift
    return levels.to(scale.dtype) * _along(node, scale, levels)


def _cast(node: Node, x: Tensor) -> Tensor:
    to = node.integer("to", 1)
    if to not in _TYPES:
        raise node.refuse(f"a type it cannot hold (TensorProto type {to})")
    found = x.to(_TYPES[to])
    return half(found) if to == FLOAT16 else found


OPERATORS: Table = {
    "QuantizeLinear": Operator(_quantize, ("axis", "block_size", "output_dtype", "precision", "saturate"), moves=True),
    "DequantizeLinear": Operator(_dequantize, ("axis", "block_size", "output_dtype")),
    "Cast": Operator(_cast, ("to", "saturate", "round_mode"), moves=True),
    "CastLike": Operator(lambda node, x, like: x.to(like.dtype), ("saturate", "round_mode")),
}
