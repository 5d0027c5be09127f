"""HopSkipJump: the closed-form radius of a linear net found by decisions alone, within its queries, image by image."""

import numpy as np
import pytest
import torch

from robustkd.attacks import hopskipjump
from robustkd.attacks.hopskipjump import HopSkipJump
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, images, linear
from tests.unit.test_rays import labels_of

BALLS = [ThreatModel(eps=0.12), ThreatModel(norm="l2", eps=0.7)]
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
IN_BALLS = pytest.mark.parametrize("threat", BALLS, ids=lambda threat: threat.norm)


def radii(net, x, norm):
    """The distance of the nearest boundary of a two-class linear net, without the box: the gap over the dual norm."""
    z, weight = net(x).detach().double(), net[1].weight.detach().double()
    return (z[:, 0] - z[:, 1]).abs() / (weight[0] - weight[1]).norm(p=1 if norm == "linf" else 2)


def right(n, net):
    data = images(n)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    keep = margin(net(x), y) > 0
    return x[keep], y[keep]


@NORMS
def test_it_finds_the_radius_of_a_linear_net_from_labels_alone(norm):
    net = linear(2)
    x = 0.5 + 0.05 * torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y, model, looked = net(x).argmax(1), labels_of(net), 0
    for r, image, label in zip(radii(net, x, norm).tolist(), x, y, strict=True):
        if not 1e-3 < r < 0.4:
            continue
        looked += 1
        for factor, fooled in ((1.15, True), (0.98, False)):
            threat = ThreatModel(norm=norm, eps=r * factor)
            adv = HopSkipJump(queries=2000).perturb(model, image[None], label[None], threat, seed=0).x_adv
            assert bool(margin(model(adv), label[None]) <= 0) is fooled, (factor, r)
    assert looked > 6


@IN_BALLS
@pytest.mark.parametrize("queries", [1, 3, 17, 40, 250, 800])
def test_no_image_gets_more_than_its_queries(queries, threat):
    net = labels_of(Quadrants())
    x, y = right(8, net)
    small, received = ThreatModel(norm=threat.norm, eps=1e-4), []

    def counting(z):
        received.append(len(z))
        return net(z)

    for i in range(len(x)):
        received.clear()
        found = HopSkipJump(queries=queries).perturb(counting, x[i : i + 1], y[i : i + 1], small, seed=0)
        assert found.forwards == sum(received)
        assert queries <= sum(received) <= queries + 2, "one look each of the guard before and after"
        assert max(received) <= hopskipjump.CALL
    received.clear()
    found = HopSkipJump(queries=queries).perturb(counting, x, y, small, seed=0)
    assert found.forwards == sum(received) <= (queries + 2) * len(x) and max(received) <= hopskipjump.CALL


@IN_BALLS
def test_it_breaks_what_labels_hide_and_then_asks_no_more(threat):
    net = labels_of(Quadrants())
    x, y = right(32, net)
    found = HopSkipJump(queries=1500).perturb(net, x, y, threat, seed=0)
    left = int((margin(net(found.x_adv), y) > 0).sum())
    assert left < 0.25 * len(x)
    assert found.forwards < 0.5 * 1500 * len(x)
    assert (threat.distance(found.x_adv, x) <= threat.eps + 1e-6).all()


@IN_BALLS
def test_images_are_searched_each_for_itself(threat):
    net, attack = labels_of(Quadrants()), HopSkipJump(queries=400)
    x, y = right(24, net)
    small = ThreatModel(norm=threat.norm, eps=threat.eps / 2)
    whole = attack.perturb(net, x, y, small, seed=5)
    assert (whole.x_adv != x).any()
    parts = [attack.perturb(net, x[i : i + 5], y[i : i + 5], small, seed=5) for i in range(0, len(x), 5)]
    assert torch.equal(torch.cat([part.x_adv for part in parts]), whole.x_adv)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    assert torch.equal(attack.perturb(net, x[order], y[order], small, seed=5).x_adv, whole.x_adv[order])
    other = attack.perturb(net, x, y, small, seed=6)
    assert not torch.equal(other.x_adv, whole.x_adv)


@IN_BALLS
@pytest.mark.parametrize("like", ["constant", "tied"])
def test_where_no_start_is_found_the_clean_image_comes_back(like, threat):
    x, y = right(6, Quadrants())

    def one_answer(z):
        return torch.nn.functional.one_hot(y[:1].expand(len(z)), 4).float()

    x, y = x[:1].repeat(3, 1, 1, 1), y[:1].repeat(3)
    if like == "tied":  # a tie is a break: nothing needs to be changed
        found = HopSkipJump(queries=50).perturb(lambda z: 0 * one_answer(z), x, y, threat, seed=0)
        assert (threat.distance(found.x_adv, x) <= threat.eps).all()
        return
    found = HopSkipJump(queries=5000).perturb(one_answer, x, y, threat, seed=0)
    assert torch.equal(found.x_adv, x)
    assert found.forwards <= 3 * (hopskipjump.DRAWS + 2)


@IN_BALLS
def test_what_is_robust_in_the_ball_stays_so(threat):
    net = labels_of(Quadrants())
    x, y = right(8, net)
    found = HopSkipJump(queries=300).perturb(net, x, y, ThreatModel(norm=threat.norm, eps=1e-5), seed=0).x_adv
    assert (margin(net(found), y) > 0).all() and (ThreatModel(norm=threat.norm).distance(found, x) <= 1.1e-5).all()


@NORMS
def test_a_number_that_is_none_counts_as_crossed(norm):
    """Finite for the clean images, NaN for all others: noise of any kind is a start, and close by too."""
    x, y = right(6, Quadrants())

    def validator(z):
        known = (z[:, None] == x[None]).flatten(2).all(2).any(1)
        return torch.where(known[:, None], Quadrants()(z), torch.full((len(z), 4), torch.nan))

    with torch.no_grad():
        adv = HopSkipJump(queries=60).perturb(validator, x, y, ThreatModel(norm=norm, eps=0.05), seed=0).x_adv
        assert validator(adv).isnan().any(1).all()


def test_coarse_noise_starts_where_fine_noise_is_one_class():
    """A net of the mean over blocks gives all fine noise one answer; every other draw is coarse."""

    def by_contrast(z):
        blocks = torch.nn.functional.avg_pool2d(z, 4).flatten(1)
        spread = blocks.amax(1) - blocks.amin(1)
        return torch.stack([0.3 - spread, spread - 0.3], 1)

    x, y = torch.full((4, 1, 16, 16), 0.5), torch.zeros(4, dtype=torch.long)
    x += 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(eps=0.25)
    adv = HopSkipJump(queries=3000).perturb(by_contrast, x, y, threat, seed=0).x_adv
    assert (margin(by_contrast(adv), y) <= 0).all()
