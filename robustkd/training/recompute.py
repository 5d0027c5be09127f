"""Half the memory of a training graph: what a batch norm and the activation after it answer is computed again for the gradient.

Torch keeps the input of a batch norm for its gradient, and of the activation after it the answer, which the next convolution
keeps as well. The answer follows from the input by a scale and a shift of each channel, which is a small part of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from robustkd.models._fold import line

NORM = "NativeBatchNormBackward0"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    NORM: lambda x: x,
    "CloneBackward0": lambda x: x,
    "HardtanhBackward0": torch.nn.functional.relu6,
    "ReluBackward0": torch.relu_,
    "SiluBackward0": torch.nn.functional.silu,
}
"""What is done to a norm's answer, by the name of the node in torch's graph."""
LEAST = 2**22
"""Bytes of a tensor that is worth computing again."""


class _Answer:
    """What a batch norm and the activation after it answered; held from its first use in a gradient to the last."""

    def __init__(self, norm: Any, activation: str) -> None:
        self._norm, self._activation = norm, activation
        bias = norm.next_functions[2][0]
        self._bias = None if bias is None else bias.variable.detach().clone()  # the graph would not notice its change
        self.uses, self._used = 0, 0
        self._value: Tensor | None = None

    @torch.no_grad()
    def value(self) -> Tensor:
        """The tensor that was to be kept."""
        value = self._computed() if self._value is None else self._value
        self._used += 1
        self._value = value if self._used % self.uses else None
        return value

    def _computed(self) -> Tensor:
        norm = self._norm
        scale, shift = line(norm._saved_result1, norm._saved_result2, norm._saved_weight, self._bias)
        return ACTIVATIONS[self._activation](torch.addcmul(shift[:, None, None], norm._saved_input, scale[:, None, None]))


class Recompute:
    """Has graphs keep no answer of a batch norm in training mode on a CPU, nor of a ReLU, ReLU6 or SiLU after it.

    Gradients are those of the plain graph up to rounding. Where no such answer is large it stops looking.
    """

    def __init__(self) -> None:
        self._answers: WeakValueDictionary[tuple[int, str], _Answer] = WeakValueDictionary()
        self._pays = True

    @contextmanager
    def graphs(self) -> Iterator[None]:
        """Graphs that grow inside."""
        if not self._pays:
            yield
            return
        self._pays = False
        with saved_tensors_hooks(self._pack, lambda kept: kept.value() if isinstance(kept, _Answer) else kept):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Answer:
        node = tensor.grad_fn
        if node is None or tensor.device.type != "cpu" or tensor.ndim != 4 or tensor.nbytes < LEAST:
            return tensor
        norm = _norm_before(node)
        if norm is None or norm._saved_result1.dtype != tensor.dtype:  # statistics are more precise than bf16 answers
            return tensor
        self._pays = True
        key = id(norm), node.name()
        if (answer := self._answers.get(key)) is None:
            answer = self._answers[key] = _Answer(norm, node.name())
        answer.uses += 1
        return answer


def _norm_before(node: Node) -> Any | None:
    """The batch norm in training mode that a tensor comes from, with no more than an activation between."""
    if node.name() not in ACTIVATIONS or (node.name() == "HardtanhBackward0" and _limits(node) != (0, 6)):
        return None
    norm: Any = node if node.name() == NORM else node.next_functions[0][0]
    if norm is None or norm.name() != NORM or not norm._saved_training:
        return None
    bias = norm.next_functions[2][0]
    return norm if bias is None or hasattr(bias, "variable") else None


def _limits(node: Any) -> tuple[float, float]:
    return node._saved_min_val, node._saved_max_val
