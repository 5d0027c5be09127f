"""The surrogate: values of the engine, gradients of the twin, and no scale that could blind a loss."""

import pytest
import torch

from robustkd.attacks._guard import Guard
from robustkd.auditing.twin import Surrogate, Values, tame, tamed
from robustkd.catalog import Shelf
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, Quadrants, TorchEngine, images, trained

ATTACKS = {"pgd": {"steps": 6}, "apgd-ce": {"steps": 8}, "apgd-t": {"steps": 6, "targets": 3}}


@pytest.fixture(scope="module")
def data():
    return images(24)


@pytest.fixture(scope="module")
def net(data):
    torch.manual_seed(0)
    return trained(Conv(), data)


def batch(data):
    return torch.from_numpy(data.floats()), torch.from_numpy(data.labels)


@pytest.mark.parametrize("name", ATTACKS)
def test_engine_equal_to_source_is_the_white_box_attack(name, data, net):
    x, y = batch(data)
    attack = Shelf("attacks").get(name)(**ATTACKS[name])
    plain = attack.perturb(net, x, y, ThreatModel(), seed=1)
    through = attack.perturb(tame(Values(TorchEngine(net)), net, x), x, y, ThreatModel(), seed=1)
    assert torch.equal(plain.x_adv, through.x_adv) and plain.forwards == through.forwards


TRANSFORMS = {
    "affine": lambda net, x: 2 * net(x) + 3,
    "huge": lambda net, x: net(x) * 1e4,
    "tiny": lambda net, x: net(x) * 1e-4,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_monotone_transform_of_the_logits_hides_nothing(name, transform, data):
    x, y = batch(data)
    net, threat = Quadrants(), ThreatModel(eps=0.05)
    attack = Shelf("attacks").get(name)(**ATTACKS[name])
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    plain = attack.perturb(tame(Values(TorchEngine(net)), net, x), x, y, threat, seed=1).x_adv
    other = TorchEngine(net, answer=TRANSFORMS[transform])
    through = attack.perturb(tame(Values(other), net, x), x, y, threat, seed=1).x_adv
    flags = [(margin(net(z), y) > 0).tolist() for z in (plain, through)]
    assert flags[0] == flags[1] and not all(flags[0])


def test_values_come_from_the_engine_and_gradients_from_the_twin(data, net):
    x, _ = batch(data)
    x = x.requires_grad_(True)
    surrogate = Surrogate(Values(TorchEngine(net, answer=lambda n, z: n(z).round())), net)
    logits = surrogate(x)
    assert torch.equal(logits.detach(), net(x).detach().round())
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((logits * weight).sum(), x)
    (expected,) = torch.autograd.grad((net(x) * weight).sum(), x)
    assert torch.equal(found, expected)


def test_rounding_in_the_engine_gives_no_gradient_without_a_twin(data, net):
    """The documented negative: autograd through Round is exactly zero."""
    x, y = batch(data)
    z = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy((net(z) * 4).round(), y), z)
    assert (grad == 0).all()


def test_a_twin_without_gradient_gives_zeros_not_a_crash(data):
    x, y = batch(data)

    class Cut(torch.nn.Module):
        def forward(self, z):
            return z.detach().flatten(1)[:, :4]

    surrogate = Surrogate(Values(TorchEngine(Cut())), Cut())
    z = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(surrogate(z).sum(), z)
    assert (grad == 0).all()
    guard = Guard(Cut(), x, y, ThreatModel())
    (grad,) = torch.autograd.grad(guard(z).sum(), z)
    assert (grad == 0).all()


def test_wide_logits_are_tamed_and_ordinary_ones_are_left_alone(data, net):
    x, _ = batch(data)
    assert tamed(net, x) is net
    wide = torch.nn.Sequential(Quadrants(gain=1e6))
    top = tamed(wide, x)(x).detach().topk(2, 1).values
    assert (top[:, 0] - top[:, 1]).quantile(0.9) == pytest.approx(10, rel=1e-3)


def test_many_classes_saturate_no_loss():
    """With 200 classes a small spread hides margins that no float32 loss survives; every image keeps its gradient."""
    scores = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 200))
    with torch.no_grad():
        scores[1].weight.mul_(1e5)
    x = torch.from_numpy(images(32).floats())
    z = x.clone().requires_grad_(True)
    y = scores(x).argmax(1)
    torch.nn.functional.cross_entropy(tamed(scores, x)(z), y).backward()
    assert (z.grad.flatten(1).abs().amax(1) > 1e-30).all()


def test_probabilities_enter_as_logarithms(data, net):
    x, _ = batch(data)
    values = Values(TorchEngine(net, answer=lambda n, z: n(z).softmax(1)), probabilities=True)
    assert torch.allclose(values(x), net(x).log_softmax(1).detach(), atol=1e-4)
    assert values.images == len(x)
