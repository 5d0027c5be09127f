"""Folding batch norms must change nothing but the last bits, on any network of the shelf, and follow its weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkd.catalog import Shelf
from robustkd.models._fold import _Convolution, _Gated, folded, frozen
from tests.unit.test_models import SMALL, every


def _used(net: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Some statistics and affine weights that training would leave, rather than zeros and ones."""
    rng = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 2.0, generator=rng)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=rng)
                module.bias.data.normal_(0, 0.2, generator=rng)
    return net


class Block(nn.Module):
    def __init__(self, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=bias)
        self.norm = nn.BatchNorm2d(4, affine=affine, eps=1e-3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Twice(Block):
    """The convolution serves two ends: its weights cannot change for one of them."""

    def forward(self, x: Tensor) -> Tensor:
        once = self.conv(x)
        return self.head((self.norm(once) + once).mean((2, 3)))


class Again(Block):
    """The same convolution is called twice, once without the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.conv(x)) + self.conv(2 * x)).mean((2, 3)))


class Wilful(Block):
    """Its path depends on the images, which a trace cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def _gradient(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(net(x).logsumexp(1).sum(), x)[0]


@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_folded_convolution_is_the_convolution_and_its_norm(bias, affine):
    net, x = _used(Block(bias, affine)).double().eval(), torch.rand(4, 3, 9, 7, dtype=torch.float64)
    again = folded(net).refreshed()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in again.modules())
    torch.testing.assert_close(again(x), net(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradient(again, x), _gradient(net, x), rtol=1e-12, atol=1e-12)


def test_it_follows_weights_and_statistics():
    net, x = _used(Block()), torch.rand(8, 3, 8, 8)
    fold, seen = folded(net), folded(net).refreshed()(x)
    net.train()
    net(x).square().sum().backward()  # moves the running statistics
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    net.eval()
    assert not torch.allclose(net(x), seen)
    torch.testing.assert_close(fold.refreshed()(x), net(x), rtol=1e-5, atol=1e-5)


def test_the_network_keeps_its_modes_weights_and_norms():
    net = _used(Block()).train()
    net.norm.eval()
    before, keys = {k: v.clone() for k, v in net.state_dict().items()}, list(net.state_dict())
    folded(net).refreshed()(torch.rand(2, 3, 8, 8))
    assert [m.training for m in (net, net.conv, net.norm)] == [True, True, False]
    assert list(net.state_dict()) == keys and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", [Twice, Again, Wilful])
def test_what_cannot_be_folded_is_left(kind):
    assert folded(_used(kind()).eval()) is None


class Norms(Block):
    """A norm of a norm: the second has no convolution of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.norm(self.conv(x))).mean((2, 3)))


def test_of_two_norms_the_first_is_folded():
    net = Norms()
    net.again = nn.BatchNorm2d(4)
    net, x = _used(net).eval(), torch.rand(4, 3, 9, 7)
    again = folded(net).refreshed()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in again.modules()) == 1
    torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-5)


def test_an_unused_norm_of_other_kind_is_left():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    assert folded(net) is None


@every
def test_every_network_folds_to_itself(name):
    torch.manual_seed(0)
    net = Shelf("models").get(name).model_validate({"name": name, **SMALL[name]}).build(channels=3, classes=10)
    net, x = _used(net).eval(), torch.rand(2, 3, 32, 32)
    again = folded(net).refreshed()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in again.modules()) < sum(
        isinstance(m, nn.BatchNorm2d) for m in net.modules()
    )
    with torch.no_grad():
        torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-4)
    same = (_gradient(again, x).sign() == _gradient(net, x).sign()).float().mean()
    assert same > 0.999


class Before(nn.Module):
    """A norm before its convolution, as in WideResNets: its ReLU in one of the ways a network may say it."""

    def __init__(self, relu: Callable[[Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.stem, self.after = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.norm, self.conv = nn.BatchNorm2d(6, affine=affine), nn.Conv2d(6, 4, 3)
        self.relu = relu
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.stem(x))
        return self.head((self.conv(self.relu(self.norm(x))) + x.mean()).mean((2, 3)))


class Shared(Before):
    """What the norm makes is read by two."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.after(self.stem(x)))
        return self.head((self.conv(x.relu()) + x.mean()).mean((2, 3)))


def _gates(net: nn.Module) -> int:
    return sum(isinstance(module, _Gated) for module in net.modules())


@pytest.mark.parametrize("relu", [F.relu, torch.relu, nn.ReLU(), Tensor.relu], ids=["F", "torch", "module", "method"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_before_a_relu_becomes_a_gate(relu, affine):
    if relu is Tensor.relu:
        relu = lambda x: x.relu()  # noqa: E731
    net = _used(Before(relu, affine)).double().eval()
    x = torch.rand(4, 3, 9, 7, dtype=torch.float64)
    gated = frozen(net)
    assert _gates(gated) == 1 and not _gates(net)
    torch.testing.assert_close(gated(x), net(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradient(gated, x), _gradient(net, x), rtol=1e-12, atol=1e-12)


def test_a_gate_in_another_precision_is_the_norm_and_the_relu():
    net, x = _used(Before(F.relu)).eval(), torch.rand(4, 3, 9, 7)
    gated = frozen(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gated(x).float(), net(x).float(), rtol=0.05, atol=0.05)
        assert gated(x).dtype == net(x).dtype


@pytest.mark.parametrize("net", [Shared(F.relu), Before(nn.SiLU())], ids=["shared", "silu"])
def test_what_is_no_gate_is_left(net):
    net, x = _used(net).eval(), torch.rand(4, 3, 9, 7)
    assert not _gates(frozen(net))
    torch.testing.assert_close(frozen(net)(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_frozen_network_keeps_its_layout_to_itself():
    net = _used(Block()).eval()
    strides = [p.stride() for p in net.parameters()]
    weights = [m.weight for m in frozen(net).modules() if isinstance(m, _Convolution)]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert [p.stride() for p in net.parameters()] == strides
