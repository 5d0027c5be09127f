"""What SAAD's paper says of it: the lettered tests of methods.md 6.2."""

from __future__ import annotations

import pytest
import torch

from robustkd.methods._base import Batch, Nets
from robustkd.methods.saad import Saad
from tests.contract.test_methods import attack, rng
from tests.nets import CLOCK, SmallNet, frozen, images, labels, make, picture, readers


def saad(**knobs: float) -> Saad:
    method = make("saad", **knobs)
    assert isinstance(method, Saad)
    return method


def pair() -> Nets:
    return Nets(SmallNet().eval(), {"robust": frozen(SmallNet(seed=7))})


def test_the_surest_image_of_the_teacher_has_no_weight() -> None:
    """(a) Weights are not negative, and the smallest is 0: its row gets no gradient in the outer loss."""
    s, a, t, u = (torch.randn(6, 10, generator=rng(i)).double() for i in range(4))
    entropy = -(u.softmax(1) * u.log_softmax(1)).sum(1)
    x, x_adv = picture(s, t).requires_grad_(True), picture(a, u).requires_grad_(True)
    loss, terms = saad().loss(readers(10), Batch(x, labels(), x_adv), None, CLOCK)
    assert loss > 0 and terms["weight_mean"].item() == pytest.approx(5 * (entropy - entropy.min()).mean().item())
    grads = torch.autograd.grad(loss, (x, x_adv))
    for grad in grads:
        size = grad.flatten(1).norm(dim=1)
        assert size[entropy.argmin()] == 0 and (size > 0).sum() == 5


def test_without_the_correction_the_attack_is_rslads() -> None:
    """(b)"""
    x, y = images(), labels()
    ours, theirs = attack(saad(correction=0), pair(), x, y, steps=5), attack(make("rslad"), pair(), x, y, steps=5)
    assert torch.equal(ours, theirs)
    assert not torch.equal(attack(saad(), pair(), x, y, steps=5), theirs)


def test_the_correction_changes_the_labels_entry_only_and_nothing_at_the_clean_image() -> None:
    """(c) and (d)"""
    nets, x, y = pair(), images(), labels()
    target, teacher = saad(correction=1.0).target(nets, x, y), nets.robust(x)
    moved = (target(x + 0.01 * torch.randn(x.shape, generator=rng())) - teacher).abs()
    label = torch.nn.functional.one_hot(y, 10).bool()
    assert (moved[label] > 0).all() and (moved[~label] == 0).all()
    assert torch.equal(target(x.clone()), teacher)


def test_the_correction_is_the_teachers_tangent() -> None:
    """To first order the target's label logit is the live teacher's: the error falls with the square of the distance."""
    nets = Nets(SmallNet(), {"robust": frozen(SmallNet(seed=7).double())})
    x, y = images().double(), labels()
    target = saad().target(nets, x, y)
    direction = torch.randn(x.shape, generator=rng(), dtype=torch.float64)
    errors = []
    for distance in (1e-4, 1e-5):
        at = x + distance * direction
        gap = (target(at) - nets.robust(at)).gather(1, y[:, None]).abs().max()
        change = (nets.robust(at) - nets.robust(x)).gather(1, y[:, None]).abs().max()
        errors.append((gap / change).item())
    assert errors[0] < 0.05 and errors[1] < 0.005


def test_the_attack_asks_the_teacher_once() -> None:
    nets = pair()
    attack(saad(), nets, images(), labels(), steps=10)
    assert len(nets.robust.seen) == 1
