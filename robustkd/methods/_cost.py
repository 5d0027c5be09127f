"""What a method costs per training image, counted: one step on networks of one layer that note each pass.

The unit is one forward pass of the network in question: forward 1, gradient to the input 1 more, full backward 2 more
(methods.md, section 1.7). Counted rather than declared, so that it cannot differ from what training does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkd.ascent import ascend, attacking
from robustkd.catalog import Shelf
from robustkd.methods._base import Batch, Clock, Method, Role
from robustkd.methods._memo import remembering
from robustkd.threat import ThreatModel

STEPS = 10  # of the attack in every paper's training
_CLASSES = 10
#: half-way through a paper's training, where whatever starts late has started
_CLOCK = Clock(epoch=100, epochs=200, step=0)


@dataclass(frozen=True)
class Cost:
    """Forward passes and their equivalents per training image: of the student, and of each teacher."""

    student: int
    teachers: dict[Role, int]


class Counting(nn.Module):
    """A linear classifier that notes what its passes cost."""

    def __init__(self, seed: int, *, trained: bool) -> None:
        super().__init__()
        weight = torch.randn(_CLASSES, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight, requires_grad=trained)
        self._passes: list[dict[str, int]] = []

    @property
    def cost(self) -> int:
        """Of all passes so far; a gradient that was never asked for costs nothing."""
        return sum(max(noted.values()) for noted in self._passes)

    def forward(self, x: Tensor) -> Tensor:
        noted = {"forward": 1}
        self._passes.append(noted)
        return _noting(x, noted, "input", 2).flatten(1) @ _noting(self.weight, noted, "weights", 3).T


def _noting(tensor: Tensor, noted: dict[str, int], name: str, cost: int) -> Tensor:
    """The tensor; once a gradient flows back to it, the pass has this cost."""
    seen = tensor.view_as(tensor)
    if seen.requires_grad:
        seen.register_hook(lambda grad: noted.update({name: cost}))  # type: ignore[no-untyped-call]
    return seen


def cost_of(name: str, *, steps: int = STEPS, knobs: Mapping[str, Any] | None = None) -> Cost:
    """Count one training step of a method of the shelf.

    Args:
        name: of the method.
        steps: of the attack, where the method attacks.
        knobs: of the method; left out, its defaults.

    Raises:
        ConfigError: no method has this name.
        RequirementError: the method needs a package that is missing.
    """
    entry: type[Method[Any, Any]] = Shelf("methods").get(name)
    config = entry.Config.model_validate({"name": name, **(knobs or {})})
    method = entry(config, classes=_CLASSES)
    student = Counting(0, trained=True)
    teachers: dict[Role, Counting] = {
        role: Counting(1 + i, trained=False).eval() for i, role in enumerate(entry.roles_for(config))
    }
    nets, state = remembering(student, dict(teachers)), method.init()
    x, y = torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8), torch.arange(4)
    x_adv = x
    if entry.adversarial:
        with attacking(student, entry.attack_mode):
            x_adv = ascend(method.inner(nets, x, y), x, threat=ThreatModel(), steps=steps, step_size=2 / 255, start=entry.start)
    parts, terms = method.loss(nets, Batch(x, y, x_adv), state, _CLOCK)
    state = method.advance(state, {"loss": parts.detach(), **terms}, _CLOCK)
    method.weigh(parts, state).backward()  # type: ignore[no-untyped-call]
    return Cost(student.cost, {role: net.cost for role, net in teachers.items()})
