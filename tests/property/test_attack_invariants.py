"""Invariants of every attack of the shelf in both norms: radii in closed form, nothing left behind by an exception."""

import random

import numpy as np
import pytest
import torch

from robustkd.auditing.twin import Surrogate, Values
from robustkd.catalog import Shelf
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, Quadrants, TorchEngine, images, linear

NORMS = ("linf", "l2")
NAMES = Shelf("attacks").names()
KNOBS = ("steps", "queries", "draws")


def make(name, effort):
    attack = Shelf("attacks").get(name)
    return attack(**{next(key for key in KNOBS if key in attack.model_fields): effort})


def able(name, norm):
    return norm in Shelf("attacks").get(name).norms


def blind(name):
    return Shelf("attacks").get(name).needs == "labels"


def radii(net, x, norm):
    """The distance at which the answer of a linear net changes, ignoring the box: the dual norm of each difference of rows."""
    layer, z = net[1], net(x).double()
    y = z.argmax(1)
    apart = (layer.weight[y][:, None] - layer.weight[None]).double()
    lengths = apart.abs().sum(-1) if norm == "linf" else apart.norm(dim=-1)
    ratio = torch.where(lengths > 0, (z.gather(1, y[:, None]) - z) / lengths.clamp_min(1e-12), torch.inf)
    return y, ratio.min(1).values


def samples(net, norm):
    """Images inside the box by more than their radius, with label and radius."""
    x = 0.5 + 0.05 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, found = radii(net, x, norm)
    room = torch.minimum(x, 1 - x).flatten(1).amin(1)
    keep = (found > 1e-3) & (found < room)
    assert keep.sum() >= 3
    return x[keep], y[keep], found[keep].tolist()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", NAMES)
def test_no_attack_breaks_a_linear_net_within_its_radius(name, classes, norm):
    net = linear(classes)
    for image, label, r in zip(*samples(net, norm), strict=True):
        found = make(name, 6).perturb(net, image[None], label[None], ThreatModel(norm=norm, eps=0.99 * r), seed=0)
        with torch.no_grad():
            assert (margin(net(found.x_adv), label[None]) > 0).all()


#: on ten classes the cross entropy need not lead to the nearest one; the targeted attacks try each
STRONG = [("pgd", 2), ("apgd-ce", 2), ("fab-t", 2), ("apgd-t", 10), ("fab-t", 10)]


@pytest.mark.parametrize("through", ["itself", "surrogate"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "classes"), STRONG)
def test_strong_attacks_break_it_just_above(name, classes, norm, through):
    net = linear(classes)
    engine = TorchEngine(net, (1, 4, 4), classes)
    model = net if through == "itself" else Surrogate(Values(engine), linear(classes))
    for image, label, r in zip(*samples(net, norm), strict=True):
        found = make(name, 40).perturb(model, image[None], label[None], ThreatModel(norm=norm, eps=1.02 * r), seed=0)
        with torch.no_grad():
            assert (margin(net(found.x_adv), label[None]) <= 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("noise", "pgd") and not blind(name)])
def test_what_comes_back_is_no_better_for_the_defender(name, norm):
    """Draws, the last step of a fixed length, and what was found by labels may be; all others give back their best."""
    data = images(10, seed=3)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    net = Quadrants()
    for seed in (0, 1):
        found = make(name, 12).perturb(net, x, y, ThreatModel(norm=norm, eps=0.03 if norm == "linf" else 0.2), seed=seed)
        with torch.no_grad():
            before, after = margin(net(x), y), margin(net(found.x_adv), y)
        assert ((after <= before + 1e-4) | (after <= 0)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("calls", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_an_exception_leaves_nothing_behind(name, calls, norm):
    if not able(name, norm):
        pytest.skip(f"it does not know the norm {norm}")

    class Failing(Conv):
        left = calls

        def forward(self, z):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("gone")
            return super().forward(z)

    net = Failing().train()
    net.head.bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    data = images(6)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    with torch.no_grad():
        y = Conv().eval()(x).argmax(1)  # its own answers, so that every image is attacked
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(RuntimeError, match="gone"):
        make(name, 30).perturb(net, x, y, ThreatModel(norm=norm, eps=0.01), seed=0)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert net.training and net.body[1].training
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
