"""All operators of the importer."""

from __future__ import annotations

from robustkd.engines.importer import (
    convolution,
    elementwise,
    normalization,
    pooling,
    quantization,
    reduction,
    resampling,
    shape,
)
from robustkd.engines.importer.node import Table

_FAMILIES = (convolution, elementwise, normalization, pooling, quantization, reduction, resampling, shape)

OPERATORS: Table = {name: operator for family in _FAMILIES for name, operator in family.OPERATORS.items()}

#: versions of the operator set whose definitions are followed
OPSETS = range(9, 25)
