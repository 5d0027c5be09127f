"""The relative cost of a method, against methods.md by hand and against the passes and backward passes of a real net."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustkd.ascent import ascend, attacking
from robustkd.catalog import Shelf
from robustkd.methods._base import Batch, Clock
from robustkd.methods._cost import STEPS, cost_of
from robustkd.methods._memo import remembering
from robustkd.threat import ThreatModel
from tests.nets import SmallNet, frozen, images, labels, make

#: by hand from the sequences of methods.md: 2 a step of the attack; an outer pass 3, or 1 where nothing flows back
BY_HAND = {
    "standard": (3, {}),
    "pgd-at": (20 + 3 + 1, {}),
    "trades": (1 + 20 + 9, {}),
    "rslad": (20 + 6, {"robust": 1}),
    "adaad": (20 + 1 + 3, {"robust": 20 + 2}),
    "dgad": (20 + 6, {"robust": 20 + 2}),
}
#: methods.md 1.7: giga-MACs of one forward pass; below, of a whole training image
GMACS = {"resnet18": 0.555, "mobilenet-v2": 0.0912, "wrn-34-10": 6.66, "wrn-34-20": 26.6}
PUBLISHED = [
    ("pgd-at", "resnet18", "wrn-34-10", 13),
    ("dgad", "resnet18", "wrn-34-10", 161),
    ("dgad", "mobilenet-v2", "wrn-34-10", 149),
    ("dgad", "mobilenet-v2", "wrn-34-20", 588),
]


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_cost_by_hand(name: str) -> None:
    cost = cost_of(name)
    assert (cost.student, cost.teachers) == BY_HAND[name]


@pytest.mark.parametrize(("name", "student", "teacher", "expected"), PUBLISHED)
def test_cost_in_macs_is_that_of_the_literature(name: str, student: str, teacher: str, expected: float) -> None:
    cost = cost_of(name)
    macs = cost.student * GMACS[student] + sum(cost.teachers.values()) * GMACS[teacher]
    assert macs == pytest.approx(expected, rel=0.03)


class Watched:
    """Forward passes of a net, and how often a gradient came back to its output, by hooks."""

    def __init__(self, net: nn.Module) -> None:
        self.forward = self.backward = 0
        net.register_forward_hook(self._passed)

    def _passed(self, net: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._returned)

    def _returned(self, grad: torch.Tensor) -> None:
        self.backward += 1


@pytest.mark.parametrize("name", Shelf("methods").names())
def test_cost_is_what_a_real_net_sees(name: str) -> None:
    method, x, y = make(name), images(), labels()
    student = SmallNet()
    teachers = {role: frozen(SmallNet(seed=7 + i)) for i, role in enumerate(type(method).roles)}
    nets = remembering(student, dict(teachers))
    watched, watching = Watched(student), {role: Watched(net) for role, net in teachers.items()}
    x_adv = x
    if method.adversarial:
        with attacking(student, method.attack_mode):
            inner = method.inner(nets, x, y)
            x_adv = ascend(inner, x, threat=ThreatModel(), steps=STEPS, step_size=2 / 255, start=method.start)
    # the attack asks for the gradient of the image only: each way back costs as much as a forward pass
    attack = watched.forward + watched.backward
    before = watched.forward, watched.backward
    student.train()
    clock, state = Clock(epoch=100, epochs=200, step=0), method.init()
    parts, terms = method.loss(nets, Batch(x, y, x_adv), state, clock)
    state = method.advance(state, {"loss": parts.detach(), **terms}, clock)
    method.weigh(parts, state).backward()
    outer = watched.forward - before[0] + 2 * (watched.backward - before[1])
    cost = cost_of(name)
    assert cost.student == attack + outer
    assert cost.teachers == {role: net.forward + net.backward for role, net in watching.items()}


def test_the_attack_costs_in_proportion_to_its_steps() -> None:
    short, long = cost_of("adaad", steps=1), cost_of("adaad", steps=4)
    assert long.student - short.student == long.teachers["robust"] - short.teachers["robust"] == 6
