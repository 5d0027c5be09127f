"""Answers of batch norms that are computed again for the gradient are the same answers, and their memory is free until then."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkd.training import recompute
from robustkd.training.recompute import Recompute
from tests.unit.test_models import SMALL, build, every


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST", 0)


class Chain(nn.Module):
    """conv-norm-activation, twice; what comes out of the first activation is read twice."""

    def __init__(self, activation, *, affine: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, affine=affine) for _ in range(2))
        self.activation = activation
        self.seen: list[weakref.ref[Tensor]] = []
        for norm in self.norms if affine else ():
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.activation(self.norms[0](self.first(x)))
        self.seen.append(weakref.ref(middle.untyped_storage()))
        return (self.activation(self.norms[1](self.second(middle))) * self.second(middle)).mean((2, 3))


def gradients(net: nn.Module, x: Tensor, *, again: bool) -> list[Tensor]:
    """Of all weights, in training mode, after the loss was taken inside or outside."""
    net.train().zero_grad()
    if again:
        with Recompute().graphs():
            loss = net(x).square().sum()
    else:
        loss = net(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def close(net: nn.Module, x: Tensor) -> None:
    for ours, plain in zip(gradients(net, x, again=True), gradients(net, x, again=False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


ACTIVATIONS = [F.relu, torch.relu_, F.relu6, lambda x: F.relu6(x, inplace=True), F.silu, F.hardtanh, F.gelu, lambda x: x]


@pytest.mark.parametrize(
    "activation", ACTIVATIONS, ids=["relu", "relu_", "relu6", "relu6_", "silu", "hardtanh", "gelu", "none"]
)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_the_plain_graph(activation, affine):
    torch.manual_seed(0)
    close(Chain(activation, affine=affine).double(), torch.randn(4, 3, 9, 9, dtype=torch.float64))


@every
def test_every_network_has_the_gradients_of_its_plain_graph(name):
    torch.manual_seed(0)
    close(build(name, **SMALL[name]).double(), torch.rand(3, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("activation", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("again", [True, False])
def test_the_answer_itself_is_free_until_the_gradient(again, activation):
    net, x = Chain(ACTIVATIONS[activation]), torch.randn(2, 3, 9, 9)
    with Recompute().graphs() if again else torch.enable_grad():
        loss = net(x).sum()
    gc.collect()
    assert (net.seen[0]() is None) == again
    loss.backward()


def test_it_is_computed_once_for_all_that_read_it(monkeypatch):
    done = []
    plain = recompute.ACTIVATIONS["ReluBackward0"]
    monkeypatch.setitem(recompute.ACTIVATIONS, "ReluBackward0", lambda x: done.append(x.shape) or plain(x))
    gradients(Chain(F.relu), torch.randn(2, 3, 9, 9), again=True)
    assert len(done) == 2, "one for each norm: the activation's own gradient and two convolutions share the first"


def test_a_graph_can_be_asked_twice():
    net, x = Chain(F.relu).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with Recompute().graphs():
        loss = net(x).square().sum()
    first, second = (torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_of_the_gradient():
    net, x = Chain(F.silu).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    found = []
    for graphs in (Recompute().graphs(), torch.enable_grad()):
        with graphs:
            (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(net.parameters()), allow_unused=True))
    for ours, plain in zip(*found, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_a_bias_that_moves_in_between_is_not_taken_for_the_one_that_answered():
    net, x = Chain(F.relu).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plain = gradients(net, x, again=False)
    net.zero_grad()
    with Recompute().graphs():
        loss = net(x).square().sum()
    with torch.no_grad():
        net.norms[0].bias += 1.0  # torch's own graph does not need it, and so does not mind
    loss.backward()
    for ours, theirs in zip((p.grad for p in net.parameters()), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_running_statistics_move_once():
    nets = [Chain(F.relu), Chain(F.relu)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 9, 9)
    for net, again in zip(nets, (True, False), strict=True):
        gradients(net, x, again=again)
    ours, plain = (net.norms.state_dict() for net in nets)
    assert all(torch.equal(ours[key], plain[key]) for key in plain if "running" in key or "num" in key)


def test_a_norm_in_eval_mode_is_left_alone():
    net, x = Chain(F.relu).eval(), torch.randn(2, 3, 9, 9)
    with Recompute().graphs():
        loss = net(x).sum()
    assert net.seen[0]() is not None
    loss.backward()


def test_answers_in_bf16_are_kept():
    net, x = Chain(F.relu), torch.randn(4, 3, 9, 9)
    plain, ours = [], []
    for found, again in ((plain, False), (ours, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found += gradients(net, x, again=again)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_norm_of_vectors_is_left_alone():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(6, 4)
    plain, ours = (gradients(net, x, again=again) for again in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_where_nothing_is_large_it_stops_looking(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST", 2**30)
    saved = []
    real = recompute.saved_tensors_hooks
    monkeypatch.setattr(recompute, "saved_tensors_hooks", lambda *hooks: saved.append(1) or real(*hooks))
    found = Recompute()
    for _ in range(3):
        with found.graphs():
            Chain(F.relu)(torch.randn(2, 3, 9, 9)).sum().backward()
    assert saved == [1]


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (5, 3, 16, 16)])
def test_it_keeps_about_half(shape):
    """Bytes that the graph itself holds, counted where torch hands them over."""
    layers = ((nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise((3, 8, 8, 8, 8)))
    deep, x = nn.Sequential(*(module for some in layers for module in some)), torch.randn(shape)
    held = []
    for answers in (True, False):
        kept: dict[int, int] = {}
        found = Recompute()

        def note(tensor, kept=kept, pack=found._pack if answers else lambda t: t):
            packed = pack(tensor)
            if isinstance(packed, Tensor) and packed.ndim == 4 and packed.shape[-1] == tensor.shape[-1] > 3:
                kept[packed.data_ptr()] = packed.nbytes
            return packed

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t.value() if not isinstance(t, Tensor) else t):
            deep(x)
        held.append(sum(kept.values()))
    assert 0.45 < held[0] / held[1] < 0.65
