"""FAB of our own against the authors' package: the same queries while no image leaves, the same flags when images do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack.fab_projections import projection_linf

from robustkd.attacks import _fab
from robustkd.attacks._auto import NORMS
from robustkd.attacks._fab import Fab, linf
from robustkd.attacks._guard import Guard
from robustkd.threat import ThreatModel
from tests.attacked import THREATS, Recorder, batch, victim


class Patient(Guard):
    """Lets no image go."""

    def settled(self, z, margins, rows):
        return torch.zeros(len(z), dtype=torch.bool)


def authors(model, x, y, threat, steps, targets):
    from pyautoattack.fab_pt import FABAttack_PT

    attack = FABAttack_PT(
        model,
        norm=NORMS[threat.norm],
        eps=threat.eps,
        n_iter=steps,
        n_restarts=1,
        targeted=True,
        n_target_classes=targets,
        seed=0,
        device="cpu",
    )
    return attack.perturb(x, y)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_every_query_is_the_authors_until_an_image_leaves(threat, monkeypatch):
    net, data = victim(), batch(64)
    if threat.norm == "linf":  # with their projection, whose rounding differs from ours
        monkeypatch.setattr(_fab, "linf", projection_linf)
    theirs, ours = Recorder(net), Recorder(net)
    expected = authors(theirs, *data, threat, 12, 3)
    found = Fab(threat, 12, 3).search(Patient(ours, *data, threat), *data)
    assert len(ours.asked) == len(theirs.asked) > 12
    for a, b in zip(ours.asked, theirs.asked, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    broken = (net(expected).argmax(1) != data[1]) & (net(data[0]).argmax(1) == data[1])
    assert 0 < broken.sum() < len(broken)
    assert torch.equal(broken, (found != data[0]).flatten(1).any(1))
    torch.testing.assert_close(found[broken], expected[broken], rtol=0, atol=1e-4)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_images_that_leave_are_broken_and_the_others_go_on_as_before(threat):
    net, (x, y) = victim(), batch(64)
    stayed = Fab(threat, 20, 3).search(all_along := Patient(net, x, y, threat), x, y)
    left = Fab(threat, 20, 3).search(shorter := Guard(net, x, y, threat), x, y)
    broken = [net(z).argmax(1) != y for z in (stayed, left)]
    assert torch.equal(*broken) and 0 < broken[0].sum() < len(y)
    assert (threat.distance(left, x) <= threat.eps + 1e-6).all()
    assert shorter.forwards < all_along.forwards


def test_an_image_that_no_slope_leads_away_from_stays_where_it_is():
    x, y = batch(64)
    flat = torch.nn.functional.one_hot(y, 4).float()
    threat = ThreatModel(eps=0.03)

    def constant(z):
        return flat[: len(z)] + 0 * z.flatten(1).sum(1, keepdim=True)

    assert torch.equal(Fab(threat, 3, 2).search(Guard(constant, x, y, threat), x, y), x)


@given(
    seed=st.integers(0, 2**16),
    pixels=st.integers(1, 40),
    reach=st.floats(0, 3),
    edges=st.floats(0, 1),
    zeros=st.floats(0, 1),
)
def test_the_projection_is_the_shortest_way_in_the_box(seed, pixels, reach, edges, zeros):
    rng = torch.Generator().manual_seed(seed)
    points = torch.rand(6, pixels, generator=rng, dtype=torch.float64)
    at_edge = torch.rand(6, pixels, generator=rng) < edges
    points = torch.where(at_edge, points.round(), points)
    normals = torch.randn(6, pixels, generator=rng, dtype=torch.float64)
    normals[torch.rand(6, pixels, generator=rng) < zeros] = 0
    offsets = (normals * points).sum(1) + reach * torch.randn(6, generator=rng, dtype=torch.float64)
    ways = linf(points, normals, offsets)
    moved = points + ways
    assert (moved >= -1e-12).all() and (moved <= 1 + 1e-12).all() and (ways[normals == 0] == 0).all()
    rest = offsets - (normals * moved).sum(1)
    missing = offsets - (normals * points).sum(1)
    signs = torch.where(missing < 0, -1.0, 1.0).to(normals)[:, None]
    room = torch.where(signs * normals > 0, 1 - points, points) * (normals != 0)
    far = room == ways.abs()
    on_plane = rest.abs() < 1e-9
    assert (on_plane | far.all(1)).all(), "on the plane, or as far as the box goes"
    assert (rest * missing >= -1e-9).all(), "never beyond the plane"
    longest = ways.abs().amax(1, keepdim=True)
    assert (far | (ways.abs() >= longest - 1e-12) | (normals == 0)).all(), "all move alike but those at the edge"


def test_the_projection_is_that_of_the_package():
    rng = torch.Generator().manual_seed(0)
    points, normals = torch.rand(50, 75, generator=rng), torch.randn(50, 75, generator=rng)
    offsets = (normals * points).sum(1) + 3 * torch.randn(50, generator=rng)
    torch.testing.assert_close(linf(points, normals, offsets), projection_linf(points, normals, offsets), rtol=1e-4, atol=1e-5)
