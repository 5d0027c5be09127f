"""8-bit images: on the grid and in the ball for every radius, natively searched, and part of the worst case."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkd.attacks._grid import anchored, on_grid
from robustkd.auditing.run import run_audit
from robustkd.catalog import Shelf
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_run import FACTS, LAX, SMALL, go

RADII = [8 / 255, 0.031, 1 / 255, 0.3 / 255]
NATIVE = SMALL.model_copy(update={"uint8": "native"})


def exact(z):
    """Whether every pixel is bit by bit what an 8-bit image holds."""
    level = (z.double() * 255).round()
    return torch.equal(z, level.float() / 255)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(RADII), st.sampled_from(["linf", "l2"]), st.booleans())
def test_the_nearest_8_bit_image_of_the_ball(seed, eps, norm, gridded):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 5, 5, generator=rng)
    x = (x * 255).round() / 255 if gridded else x
    threat = ThreatModel(norm=norm, eps=eps)
    z = threat.project(x + 2 * eps * torch.randn(x.shape, generator=rng), x)
    found = on_grid(z, x, threat)
    assert (threat.distance(found, x) <= eps + 1e-6).all() and found.min() >= 0 and found.max() <= 1
    assert torch.equal(on_grid(found, x, threat), found)
    for image, origin in zip(found, x, strict=True):
        assert exact(image) or torch.equal(image, origin)  # a ball of an odd image may hold no 8-bit image
    if gridded:
        assert exact(found)
        if norm == "linf":  # no other pixel of the grid inside the ball is nearer
            assert ((found - z).abs() <= 1 / 255 + 1e-6).all()


@pytest.mark.parametrize("eps", RADII)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_native_attack_returns_8_bit_images_of_the_ball(eps, norm):
    data = images(16)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    threat = ThreatModel(norm=norm, eps=eps)
    adv = Shelf("attacks").get("apgd-grid")(steps=6).perturb(Quadrants(), x, y, threat, seed=0).x_adv
    assert exact(adv) and (threat.distance(adv, x) <= eps + 1e-6).all()
    if norm == "linf" and eps < 1 / 255:
        assert torch.equal(adv, x)


def test_a_ball_around_the_nearest_8_bit_image_lies_inside():
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    anchor, inner = anchored(x, ThreatModel(eps=0.031))
    assert exact(anchor) and inner.eps == 7 / 255
    assert ((anchor - x).abs() + inner.eps <= 0.031 + 1e-6).all()


class Wiggling(Quadrants):
    """Adds what is zero on every 8-bit image: float attacks chase it, and rounding takes it away again."""

    def forward(self, x):
        return super().forward(x + 0.5 * torch.sin(2 * torch.pi * 255 * x).detach())


def test_searching_on_the_grid_beats_rounding_afterwards():
    data = images(64)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    net, threat, left = Wiggling(), ThreatModel(eps=12 / 255), {}
    for name in ("apgd-ce", "apgd-grid"):
        adv = Shelf("attacks").get(name)(steps=30).perturb(net, x, y, threat, seed=0).x_adv
        left[name] = int((margin(net(on_grid(adv, x, threat)), y) > 0).sum())
    assert left["apgd-grid"] < left["apgd-ce"], left


def test_both_figures_are_in_the_result_and_the_worse_counts():
    data = images(48)
    result, arrays = go(TorchEngine(Quadrants()), data, source=Quadrants(), policy=NATIVE)
    for side, track in ((result.engine, arrays.ledger.engine), (result.source_model, arrays.ledger.source)):
        both = side.robust_accuracy_float.estimate, side.robust_accuracy_uint8.estimate
        assert side.robust_accuracy.estimate <= min(both) <= max(both) <= side.clean_accuracy.estimate
        eight = track.clean.robust & ~track.broken(["uint8-post", "apgd-grid"])
        assert eight.mean() == both[1]
    none, _ = go(TorchEngine(Quadrants()), data, source=Quadrants(), policy=SMALL.model_copy(update={"uint8": "none"}))
    assert none.engine.robust_accuracy_uint8 is None
    assert none.engine.robust_accuracy_float == none.engine.robust_accuracy == result.engine.robust_accuracy_float
    assert "skipped" in {c.status for c in none.checks if c.name == "8-bit images"}


class Guarded(TorchEngine):
    """Answers any image that is no 8-bit image by the clean one next to it: it defends float attacks alone."""

    def __init__(self, net, stored):
        self.stored = torch.from_numpy(stored)
        super().__init__(net, answer=self.guarded)

    def guarded(self, net, x):
        odd = ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) > 1e-5
        nearest = torch.cdist(x.flatten(1), self.stored.flatten(1)).argmin(1)
        return net(torch.where(odd.view(-1, 1, 1, 1), self.stored[nearest], x))


def test_an_engine_that_defends_float_images_alone_is_broken_by_8_bit_images():
    data = images(48)
    engine = Guarded(Quadrants(), data.floats())
    result, _ = go(engine, data, source=Quadrants(), threat=ThreatModel(eps=0.15))
    assert result.engine.robust_accuracy_float.estimate > 0.9 and result.engine.robust_accuracy_uint8.estimate < 0.1
    check = next(c for c in result.checks if c.name == "8-bit images")
    assert check.status == "warn" and result.verdict.status == "invalid"
    assert result.difference.robust.estimate < 0.1  # the source is as weak on the same images


def test_images_off_the_grid_are_judged_as_8_bit_images_too():
    data = images(24)
    floats = type(data)(data.floats() * np.float32(0.97) + np.float32(0.01), data.labels, data.classes, "floats", "test")
    result, _ = run_audit(
        TorchEngine(Quadrants()), artifact=FACTS, images=floats, threat=ThreatModel(eps=0.03), policy=NATIVE, audit=LAX
    )
    assert result.engine.robust_accuracy_uint8.estimate <= result.engine.clean_accuracy.estimate
    assert not [c for c in result.checks if c.name.startswith("S15") and c.status != "ok"]
