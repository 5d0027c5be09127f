"""Our Square: the authors' search on the same draws, and what theirs cannot do on coarse outputs."""

import copy

import numpy as np
import pytest
import torch

from robustkd.attacks.square_ties import SquareTies, Streams, _side, place
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, Quadrants, images, trained

THREAT = ThreatModel(eps=0.04)


@pytest.fixture(scope="module")
def batch():
    data = images(32)
    return torch.from_numpy(data.floats()), torch.from_numpy(data.labels)


@pytest.fixture(scope="module")
def net():
    return trained(Conv(), images(64))


def robust(model, x_adv, y):
    return (margin(model(x_adv), y) > 0).tolist()


def authors(net, x, y, queries, seed):
    """The authors' code on one image, fed with the draws of our stream."""
    from pyautoattack.square import SquareAttack

    streams, state = Streams(x, seed), {"query": -1, "axis": 0}
    channels, _, width = x.shape[1:]

    def random_choice(shape):
        if len(shape) == 4:  # the stripes of the start
            return streams.signs(0, channels * width).view(shape)
        return streams.squares(state["query"], torch.tensor([0]), channels, 1, (1, 1)).view(shape)

    def random_int(low=0, high=1, shape=(1,)):
        if state["axis"] == 0:
            state["query"] += 1
        word = streams.words(state["query"], channels + 2)[:, state["axis"]]
        state["axis"] = 1 - state["axis"]
        return torch.from_numpy(place(word, high))

    attack = SquareAttack(net, norm="Linf", n_queries=queries, eps=THREAT.eps, p_init=0.8, resc_schedule=False, device="cpu")
    attack.random_choice, attack.random_int, attack.ndims = random_choice, random_int, 3
    state["query"] = 0
    attack.orig_dim = list(x.shape[1:])
    with torch.no_grad():
        return attack.attack_single_run(x, y)


def test_the_authors_search_on_the_same_draws_gives_the_same_flags_and_queries(batch, net):
    x, y = batch
    ours = SquareTies(queries=60, accept_equal=False)
    seen, flags = [], []
    for image, label in zip(x, y, strict=True):
        image, label = image[None], label[None]
        if margin(net(image), label) <= 0:
            continue
        received = []

        def model(z, received=received):
            received.append(len(z))
            return net(z)

        mine = ours.perturb(model, image, label, THREAT, seed=3).x_adv
        queries, theirs = authors(net, image, label, 60, 3)
        assert robust(net, mine, label) == robust(net, theirs, label)
        assert torch.allclose(mine, theirs, atol=1e-6)
        seen.append(len(received) - 1 - int(queries))  # the guard looks at the clean image first
        flags += robust(net, mine, label)
    assert set(seen) == {0} and set(flags) == {True, False}


@pytest.mark.parametrize("query", range(0, 10000, 97))
def test_the_schedule_of_the_square_is_the_authors(query):
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(None, resc_schedule=False)
    area = attack.p_selection(query) * 32 * 32
    assert _side(0.8, query, 32, 32) == min(max(round(area**0.5), 1), 32)


class Stepped(Quadrants):
    """Logits in coarse steps, as an int8 engine returns them."""

    def forward(self, x):
        return (super().forward(x) * 4).round() / 4


def test_plateaus_are_crossed_and_ties_are_broken_images():
    data = images(64)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    net, threat, left = Stepped(), ThreatModel(eps=0.06), {False: 0, True: 0}
    for accept in left:
        for seed in range(3):
            adv = SquareTies(queries=100, accept_equal=accept).perturb(net, x, y, threat, seed=seed).x_adv
            left[accept] += sum(robust(net, adv, y))
    assert left[True] < left[False]
    flat = SquareTies(queries=5).perturb(lambda z: 0 * z.flatten(1)[:, :4], x, y, threat, seed=0)
    assert flat.forwards <= 3 * len(x)  # every image ties at once and leaves


def test_batch_order_and_company_change_nothing(batch, net):
    x, y = batch
    net = copy.deepcopy(net).double()  # float32 sums depend on the batch by themselves
    attack, model = SquareTies(queries=25), lambda z: net(z.double())
    whole = attack.perturb(model, x, y, THREAT, seed=1).x_adv
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    mixed = torch.empty_like(whole)
    mixed[order] = attack.perturb(model, x[order], y[order], THREAT, seed=1).x_adv
    assert torch.equal(mixed, whole)
    for size in (1, 7):
        parts = [attack.perturb(model, x[i : i + size], y[i : i + size], THREAT, seed=1).x_adv for i in range(0, len(x), size)]
        assert torch.equal(torch.cat(parts), whole)


def test_in_l2_it_leaves_the_images_alone(batch, net):
    x, y = batch
    assert torch.equal(SquareTies(queries=5).perturb(net, x, y, ThreatModel(norm="l2", eps=0.5), seed=0).x_adv, x)


def test_streams_are_spread_evenly():
    x = torch.rand(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    streams = Streams(x, 0)
    assert abs(float(streams.signs(1, 4).mean())) < 0.05
    places = place(streams.words(2, 3)[:, 0], 5)
    assert np.bincount(places, minlength=5).min() > 330
    assert not np.array_equal(streams.words(1, 3), streams.words(2, 3))
    assert not np.array_equal(streams.words(1, 3), Streams(x, 1).words(1, 3))
