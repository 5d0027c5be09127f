"""One node of a graph, and what stands for an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from robustkd.errors import ArtifactError

Rounding = Literal["masked", "pass-through", "exact"]
"""How a gradient passes a rounding: `masked` straight through, but not where the value saturates; `pass-through` everywhere;
`exact` is the true derivative, zero, which blinds every attack and is here to show it."""


@dataclass
class Settings:
    """What all nodes of a module share.

    Attributes:
        rounding: how a gradient passes a rounding; may be changed.
        batch: the fixed batch that a constant shape may have written down and that may be read as "any", or None.
    """

    rounding: Rounding = "masked"
    batch: int | None = None


@dataclass(frozen=True)
class Node:
    """A node as the operators see it.

    Attributes:
        op: operator type.
        name: its name in the graph, or that of its first output.
        opset: version of the operator set; some definitions differ.
        inputs: names of values, empty where an optional one is left out.
        outputs: names of values.
        attributes: plain Python values and tensors.
        half: its floating outputs are half precision.
        settings: shared by the whole graph.
    """

    op: str
    name: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    half: bool = False
    settings: Settings = field(default_factory=Settings)

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self.attributes.get(name, default))

    def integer(self, name: str, default: int) -> int:
        """An int attribute."""
        return int(self.attributes.get(name, default))

    def integers(self, name: str) -> list[int] | None:
        """A list of ints, or None where it is left out."""
        found = self.attributes.get(name)
        return None if found is None else [int(value) for value in found]

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return str(self.attributes.get(name, default))

    def refuse(self, why: str) -> ArtifactError:
        """The error for something about this node that is not covered."""
        return uncovered(self.op, self.name, self.opset, why)


def uncovered(op: str, name: str, opset: int, why: str) -> ArtifactError:
    """The error that names an operator the importer does not cover."""
    return ArtifactError(
        f"the importer does not cover {op} of node {name}: {why}",
        where=f"node {name}, operator {op}, opset {opset}",
        fix="export with an operator listed in docs/audit.md, or give the checkpoint this was made from: --source",
    )


@dataclass(frozen=True)
class Operator:
    """What computes one operator.

    Attributes:
        run: the node and its inputs, None where one is left out, to its output or outputs.
        attributes: those it honours; any other is refused.
        static: positions of inputs that are read as plain numbers; they stay on the CPU.
        moves: its outputs are values of its inputs, so that half precision needs no rounding again.
    """

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    attributes: tuple[str, ...] = ()
    static: tuple[int, ...] = ()
    moves: bool = False


Table = Mapping[str, Operator]


def numbers(values: Tensor | Sequence[int] | None) -> list[int] | None:
    """A static input as ints."""
    if values is None:
        return None
    return [int(v) for v in (values.flatten().tolist() if isinstance(values, Tensor) else values)]


def present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """The inputs that are not left out."""
    return [value for value in values if value is not None]
