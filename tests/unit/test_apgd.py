"""Auto-PGD of our own against the authors' package: the same queries while no image leaves, the same flags when images do."""

import logging

import pytest
import torch

from robustkd.attacks._apgd import Schedule, auto_pgd
from robustkd.attacks._auto import NORMS
from robustkd.catalog import Shelf
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.attacked import THREATS, Recorder, batch, victim

SCHEDULES = [Schedule(1), Schedule(7, restarts=2), Schedule(100), Schedule(40, targets=3)]


def never(z, margins, rows):
    return torch.zeros(len(z), dtype=torch.bool)


def authors(model, x, y, threat, schedule, seed):
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    options = {
        "n_iter": schedule.steps,
        "n_restarts": schedule.restarts,
        "norm": NORMS[threat.norm],
        "eps": threat.eps,
        "seed": seed,
        "device": "cpu",
        "logger": logging.Logger("quiet"),
    }
    if schedule.targets:
        attack = APGDAttack_targeted(model, n_target_classes=schedule.targets, **options)
    else:
        attack = APGDAttack(model, loss="ce", **options)
    with torch.random.fork_rng():
        return attack.perturb(x, y)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_every_query_is_the_authors_until_an_image_leaves(threat, schedule):
    net, data = victim(), batch(64)
    theirs, ours = Recorder(net), Recorder(net)
    expected = authors(theirs, *data, threat, schedule, 5)
    found = auto_pgd(ours, *data, threat, schedule, 5, never)
    assert len(ours.asked) == len(theirs.asked) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours.asked, theirs.asked, strict=True))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_leaving_changes_no_flag_and_saves_queries(threat, name):
    net, (x, y) = victim(), batch(64)
    # the authors draw for the batch
    attack = Shelf("attacks").get(name)(steps=60, starts="batch", **({"targets": 3} if name == "apgd-t" else {}))
    quick = attack.perturb(net, x, y, threat, seed=2)
    slow = attack.perturb(net, x, y, threat, seed=2, enough=lambda z, rows: torch.zeros(len(z), dtype=torch.bool))
    bare = authors(net, x, y, threat, Schedule(60, targets=3 if name == "apgd-t" else 0), 2)
    robust = [margin(net(z), y) > 0 for z in (quick.x_adv, slow.x_adv, bare)]
    assert 0.1 < robust[2].float().mean() < 0.9
    assert torch.equal(robust[0], robust[2]) and torch.equal(robust[1], robust[2])
    assert torch.allclose(slow.x_adv, bare, atol=1e-6) and quick.forwards < slow.forwards
    # who is left standing gets the clean image back, as from the package
    assert torch.equal(quick.x_adv[robust[0]], x[robust[0]])


def test_an_image_stays_until_the_caller_has_enough():
    """What else must fall is asked of images wrong beyond rounding only, and they go on until it has fallen."""
    net, (x, y) = victim(), batch(64)
    asked = []

    def enough(z, rows):
        asked.append((z.clone(), rows.clone()))
        return margin(net(z), y[rows]) < -0.3 * net(x).std()

    attack = Shelf("attacks").get("apgd-ce")(steps=40)
    found = attack.perturb(net, x, y, THREATS[0], seed=2, enough=enough)
    assert asked and all((margin(net(z), y[rows]) < 0).all() for z, rows in asked)
    assert all((THREATS[0].distance(z, x[rows]) <= THREATS[0].eps + 1e-6).all() for z, rows in asked)
    plain = attack.perturb(net, x, y, THREATS[0], seed=2)
    assert found.forwards > plain.forwards
    assert torch.equal(margin(net(found.x_adv), y) > 0, margin(net(plain.x_adv), y) > 0)


def test_pgd_asks_nothing_more_about_an_image_that_fell():
    net, (x, y) = victim(), batch(64)
    first = Shelf("attacks").get("pgd")(steps=20).perturb(net, x, y, ThreatModel(eps=0.06), seed=0)
    assert first.forwards < 0.5 * 20 * len(x)
    assert (margin(net(first.x_adv), y) <= 0).float().mean() > 0.7
