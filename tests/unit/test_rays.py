"""RayS: the closed-form radius of a linear net found by decisions alone, within its queries."""

import torch

from robustkd.attacks.rays import RayS
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, images, linear, radius


def labels_of(net):
    return lambda x: torch.nn.functional.one_hot(net(x).argmax(1), net(x).shape[1]).float()


def test_it_finds_the_radius_of_a_linear_net_from_labels_alone():
    net = linear(2)
    x = 0.5 + 0.05 * torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y, model = net(x).argmax(1), labels_of(net)
    for r, image, label in zip(radius(net, x).tolist(), x, y, strict=True):
        if not 1e-3 < r < 0.3:
            continue
        image, label = image[None], label[None]
        for factor, fooled in ((1.15, True), (0.98, False)):
            adv = RayS(queries=1500).perturb(model, image, label, ThreatModel(eps=r * factor), seed=0).x_adv
            assert bool(margin(model(adv), label) <= 0) is fooled, (factor, r)


def test_it_keeps_to_its_queries_and_breaks_what_labels_hide():
    data = images(32)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    net = labels_of(Quadrants())
    keep = margin(net(x), y) > 0
    x, y = x[keep], y[keep]
    found = RayS(queries=200).perturb(net, x, y, ThreatModel(eps=0.15), seed=0)
    left = int((margin(net(found.x_adv), y) > 0).sum())
    assert found.forwards <= (200 + 2) * len(x)
    assert left < 0.25 * len(x)


def test_images_are_searched_each_for_itself():
    data = images(16)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    net, threat = labels_of(Quadrants()), ThreatModel(eps=0.05)
    whole = RayS(queries=60).perturb(net, x, y, threat, seed=0).x_adv
    parts = [RayS(queries=60).perturb(net, x[i : i + 5], y[i : i + 5], threat, seed=9).x_adv for i in range(0, 16, 5)]
    assert torch.equal(torch.cat(parts), whole)
