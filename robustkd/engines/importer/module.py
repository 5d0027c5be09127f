"""The torch module of a graph: constants folded, weights as buffers, nodes run one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkd.engines.importer.node import Node, Operator, Rounding
from robustkd.engines.importer.program import Program
from robustkd.engines.importer.rounding import half
from robustkd.engines.importer.table import OPERATORS
from robustkd.errors import ArtifactError

_FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, ZeroDivisionError, NotImplementedError)


@dataclass(frozen=True)
class _Step:
    """A node, what computes it, and the values nobody needs after it."""

    node: Node
    operator: Operator
    spent: tuple[str, ...]


class OnnxModule(nn.Module):
    """An ONNX image classifier, differentiable to its input; `load.import_onnx` makes one.

    Weights are frozen parameters and other constants buffers, so `.to(device)` moves them and nothing trains them. Half
    precision is rounded after every node, levels of int8 are exact, and both let a gradient pass as `rounding` says.

    Attributes:
        input_shape: C, H, W.
        batch: images at a time where the file fixes that and needs it, or None; any number may be given all the same.
        classes: K.
        opset: version of the operator set.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.input_shape, self.batch, self.opset = program.shape, program.batch, program.opset
        self._image, self._scores, self._settings = program.image, program.scores, program.settings
        nodes, constants = _folded(program)
        self._steps = _steps(nodes, program.scores)
        self._fixed: dict[str, Tensor] = {}  # numbers the operators read: they stay on the CPU
        self._name_of: dict[str, str] = {}
        for node in nodes:
            for place, name in enumerate(node.inputs):
                if name in constants:
                    self._keep(name, constants[name], static=place in OPERATORS[node.op].static)
        if program.scores in constants:
            self._keep(program.scores, constants[program.scores], static=False)
        self.classes = self._try()
        if self.batch and self._frees(self.batch):
            self.batch = None

    def _keep(self, name: str, value: Tensor, *, static: bool) -> None:
        if static:
            self._fixed[name] = value
        elif name not in self._name_of:
            self._name_of[name] = f"constant_{len(self._name_of)}"
            if value.is_floating_point() and value.dim() > 1:
                self.register_parameter(self._name_of[name], nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(self._name_of[name], value)

    @property
    def rounding(self) -> Rounding:
        """How a gradient passes a rounding; may be changed at any time."""
        return self._settings.rounding

    @rounding.setter
    def rounding(self, value: Rounding) -> None:
        self._settings.rounding = value

    def _try(self) -> int:
        """The number of classes, from one run, which also shows that every node can run."""
        rows = self.batch or 1
        with torch.no_grad():
            logits = self._run(torch.zeros(rows, *self.input_shape))
        if logits.dim() != 2 or len(logits) != rows:
            raise ArtifactError(
                f"the output has shape {tuple(logits.shape)} for {rows} images",
                where=f"output {self._scores}",
                fix="export a graph of one (N, classes) output",
            )
        return int(logits.shape[1])

    @torch.no_grad()
    def _frees(self, batch: int) -> bool:
        """Whether a fixed batch is only written down: as many images at once give what they give one batch at a time."""
        x = torch.rand(3 * batch, *self.input_shape, generator=torch.Generator().manual_seed(0))
        apart = torch.cat([self._run(x[i : i + batch]) for i in range(0, len(x), batch)])
        self._settings.batch = batch
        try:
            together = self._run(x)
        except ArtifactError:
            together = apart[:0]
        if together.shape == apart.shape and torch.allclose(together, apart, rtol=1e-4, atol=1e-5, equal_nan=True):
            return True
        self._settings.batch = None
        return False

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K), any N.

        Raises:
            ArtifactError: a node cannot take what it is given.
        """
        if not len(x):
            return x.new_zeros((0, self.classes))
        if self.batch is None or len(x) == self.batch:
            return self._run(x)
        parts = []
        for first in range(0, len(x), self.batch):
            part = x[first : first + self.batch]
            missing = self.batch - len(part)
            full = torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing else part
            parts.append(self._run(full)[: len(part)])
        return torch.cat(parts)

    def _run(self, x: Tensor) -> Tensor:
        values = {self._image: x}
        for step in self._steps:
            found = _execute(step.node, step.operator, self._inputs(step, values, x.device))
            values.update(zip(step.node.outputs, found, strict=False))
            for name in step.spent:
                values.pop(name, None)
        return values[self._scores] if self._scores in values else self._held(self._scores)

    def _held(self, name: str) -> Tensor:
        value: Tensor = getattr(self, self._name_of[name])
        return value

    def _inputs(self, step: _Step, values: dict[str, Tensor], device: torch.device) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for place, name in enumerate(step.node.inputs):
            if not name:
                found.append(None)
            elif name in values:
                found.append(values[name])
            elif place in step.operator.static:
                found.append(self._fixed[name])
            elif name in self._name_of:
                found.append(self._held(name))
            else:
                raise ArtifactError(
                    f"node {step.node.name} reads {name}, which nothing before it makes",
                    where=f"operator {step.node.op}",
                    fix="export the file again; `onnx.checker` says more",
                )
        if device.type == "cpu" or not any(v is not None and v.device == device for v in found):
            return found
        static = step.operator.static  # shapes are computed on the CPU: bring them over where they meet images
        return [v if v is None or place in static else v.to(device) for place, v in enumerate(found)]


def _execute(node: Node, operator: Operator, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    try:
        found = operator.run(node, *inputs)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise node.refuse(f"it does not run: {reason}") from error
    outputs = found if isinstance(found, tuple) else (found,)
    if node.half and not operator.moves:
        outputs = tuple(half(value) if value.is_floating_point() else value for value in outputs)
    return outputs


def _folded(program: Program) -> tuple[list[Node], dict[str, Tensor]]:
    """Nodes that depend on the images, and the values of those that do not."""
    constants, nodes = dict(program.constants), []
    with torch.no_grad():
        for node in program.nodes:
            if not all(name in constants for name in node.inputs if name) or not any(node.inputs):
                nodes.append(node)
                continue
            inputs = [constants[name] if name else None for name in node.inputs]
            constants.update(zip(node.outputs, _execute(node, OPERATORS[node.op], inputs), strict=False))
    return nodes, constants


def _steps(nodes: list[Node], scores: str) -> tuple[_Step, ...]:
    """Each node with the values that are last used by it."""
    last: dict[str, int] = {name: i for i, node in enumerate(nodes) for name in (*node.inputs, *node.outputs) if name}
    last.pop(scores, None)
    spent: dict[int, list[str]] = {}
    for name, i in last.items():
        spent.setdefault(i, []).append(name)
    return tuple(_Step(node, OPERATORS[node.op], tuple(spent.get(i, ()))) for i, node in enumerate(nodes))
