"""Our Square: the authors' search on the same draws, and what theirs cannot do on coarse outputs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from robustkd.attacks._auto import NORMS
from robustkd.attacks._square import Windows, _odd_side, eta, side
from robustkd.attacks._streams import Streams, place, signs
from robustkd.attacks.square import Square, _grid_fits
from robustkd.attacks.square_ties import SquareTies
from robustkd.losses import margin
from robustkd.threat import ThreatModel
from tests import attacked
from tests.audit_nets import Conv, Quadrants, images, trained

THREAT = ThreatModel(eps=0.04)
L2 = ThreatModel(norm="l2", eps=0.6)
THREATS = pytest.mark.parametrize("threat", [THREAT, L2], ids=["linf", "l2"])


@pytest.fixture(scope="module")
def batch():
    return attacked.batch(32)


@pytest.fixture(scope="module")
def net():
    return trained(Conv(), images(64))


def robust(model, x_adv, y):
    return (margin(model(x_adv), y) > 0).tolist()


class Draws:
    """The draws of our stream for one image, in the order in which the authors' code asks for them."""

    def __init__(self, x, norm):
        self.streams, self.query, self.at = Streams(x, 3), 0, 0
        self.each = x.shape[1] + {"linf": 2, "l2": 5}[norm]  # words of a proposal

    def words(self, n):
        self.at += n
        return self.streams.words(self.query, self.at)[0, -n:]

    def random_int(self, low=0, high=1, shape=(1,)):
        if self.query == 0 or self.at == self.each:  # nothing else begins with a place
            self.query, self.at = self.query + 1, 0
        return torch.from_numpy(place(self.words(1), high))

    def random_choice(self, shape):
        return torch.from_numpy(signs(self.words(int(np.prod(shape)))).astype(np.float32)).view(shape)

    def rand(self, shape):
        return torch.from_numpy(signs(self.words(1)) > 0).float()


def authors(net, x, y, queries, threat, monkeypatch):
    """The authors' code on one image, fed with the draws of our stream."""
    from pyautoattack.square import SquareAttack

    draws = Draws(x, threat.norm)
    norm = NORMS[threat.norm]
    attack = SquareAttack(net, norm=norm, n_queries=queries, eps=threat.eps, p_init=0.8, resc_schedule=False, device="cpu")
    attack.random_choice, attack.random_int, attack.ndims = draws.random_choice, draws.random_int, 3
    attack.orig_dim = list(x.shape[1:])
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch, "rand", draws.rand)  # whether a pattern is turned
        return attack.attack_single_run(x, y)


@THREATS
def test_the_authors_search_on_the_same_draws_gives_the_same_flags_and_queries(threat, net, monkeypatch):
    data = images(32, size=10)  # five tiles a side, as the authors' grid wants them
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
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

        mine = ours.perturb(model, image, label, threat, seed=3).x_adv
        queries, theirs = authors(net, image, label, 60, threat, monkeypatch)
        assert robust(net, mine, label) == robust(net, theirs, label)
        assert torch.allclose(mine, theirs, atol=1e-5 if threat.norm == "l2" else 1e-6)
        seen.append(len(received) - 1 - int(queries))  # the guard looks at the clean image first
        flags += robust(net, mine, label)
    assert set(seen) == {0} and set(flags) == {True, False}


@pytest.mark.parametrize("query", range(0, 10000, 97))
def test_the_schedule_of_the_square_is_the_authors(query):
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(None, resc_schedule=False)
    length = round((attack.p_selection(query) * 32 * 32) ** 0.5)
    assert side(0.8, query, 32, 32) == min(max(length, 1), 32)
    odd = max(length, 3) + (max(length, 3) % 2 == 0)
    assert _odd_side(0.8, query, 32, 32) == min(odd, 32)


@pytest.mark.parametrize("length", range(1, 34))
def test_the_pattern_of_a_window_is_the_authors(length, monkeypatch):
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(None, norm="L2", device="cpu")
    monkeypatch.setattr(torch, "rand", lambda shape: torch.zeros(shape))
    assert np.allclose(eta(length), attack.eta(length), atol=1e-6)


class Stepped(Quadrants):
    """Logits in steps of 4 on a range of about 30, as an engine of very few bits returns them."""

    def forward(self, x):
        return (super().forward(x) / 4).round() * 4


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.06), ThreatModel(norm="l2", eps=0.4)], ids=["linf", "l2"])
def test_plateaus_are_crossed_and_ties_are_broken_images(threat):
    """Where the authors' search stands still: its own code, and ours when it wants strict improvement, leave more.

    Measured in l2, 56 images and three seeds: ours leaves 27, 30 and 27, the authors' code 39, 39 and 40.
    """
    data = images(64)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    net, left = Stepped(), {}
    attacks = {
        "ours": SquareTies(queries=200),
        "strict": SquareTies(queries=200, accept_equal=False),
        "authors": Square(queries=200),
    }
    for name, attack in attacks.items():
        found = [attack.perturb(net, x, y, threat, seed=seed).x_adv for seed in range(3)]
        left[name] = sum(sum(robust(net, adv, y)) for adv in found)
    assert left["ours"] < 0.95 * min(left["strict"], left["authors"]), left
    flat = SquareTies(queries=5).perturb(lambda z: 0 * z.flatten(1)[:, :4], x, y, threat, seed=0)
    assert flat.forwards <= 3 * len(x)  # every image ties at once and leaves


def test_in_l2_it_is_as_strong_as_the_authors_on_fine_outputs():
    """Measured: of 147 images ours leaves 48, 57 and 51 with three seeds, the authors' code 56, 53 and 56."""
    data, threat = images(192, size=10, seed=3), ThreatModel(norm="l2", eps=0.5)
    net = trained(Conv(), images(128, size=10, seed=4), steps=80)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    right = margin(net(x), y) > 0
    x, y, left = x[right], y[right], []
    for attack in (SquareTies(queries=150), Square(queries=150)):
        left.append(sum(sum(robust(net, attack.perturb(net, x, y, threat, seed=seed).x_adv, y)) for seed in range(3)) / 3)
    assert 0.2 * len(x) < left[1] < 0.6 * len(x)
    assert abs(left[0] - left[1]) < 0.08 * len(x), left


@THREATS
def test_batch_order_and_company_change_nothing(threat, batch, net):
    x, y = batch
    net = copy.deepcopy(net).double()  # float32 sums depend on the batch by themselves
    attack, model = SquareTies(queries=25), lambda z: net(z.double())
    whole = attack.perturb(model, x, y, threat, seed=1).x_adv
    assert 0 < sum(robust(model, whole, y)) < sum(robust(model, x, y))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    mixed = torch.empty_like(whole)
    mixed[order] = attack.perturb(model, x[order], y[order], threat, seed=1).x_adv
    assert torch.equal(mixed, whole)
    for size in (1, 7):
        parts = [attack.perturb(model, x[i : i + size], y[i : i + size], threat, seed=1).x_adv for i in range(0, len(x), size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 14, 14), (3, 9, 23), (2, 3, 40), (1, 1, 1), (1, 2, 2)])
def test_every_l2_image_asked_is_in_the_ball_and_the_start_fills_it(shape):
    x = 0.25 + torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)) / 2
    threat = ThreatModel(norm="l2", eps=0.25)
    moves = Windows(x, threat.eps, 0.8, Streams(x, 0))
    best = moves.start()
    assert (threat.distance(best, x) - threat.eps).abs().max() < 1e-6  # no pixel is near 0 or 1
    live = torch.tensor([0, 2, 3, 4])
    for query in (1, 2, 3, 12, 60, 300, 900, 9000):
        tried = moves.tried(query, live, best[live])
        assert (threat.distance(tried, x[live]) <= threat.eps + 1e-6).all()
        assert tried.min() >= 0 and tried.max() <= 1 and tried.isfinite().all()
        best[live] = tried
    edge = torch.tensor([0.0, 1.0]).repeat(5 * x[0].numel())[: x.numel()].view_as(x)  # where half of every change is cut off
    moves = Windows(edge, threat.eps, 0.8, Streams(edge, 0))
    tried = moves.tried(1, live, moves.start()[live])
    assert tried.isfinite().all() and (threat.distance(tried, edge[live]) <= threat.eps + 1e-6).all()


def test_a_linear_net_falls_at_twice_its_l2_radius_and_never_within_it():
    """The image is 0.4 from the boundary, along weights that vary smoothly; the box is too far away to count."""
    rng = torch.Generator().manual_seed(0)
    weight = nn.functional.interpolate(torch.randn(1, 1, 3, 3, generator=rng), size=(12, 12), mode="bicubic").flatten()
    weight /= weight.norm()
    x = 0.5 + 0.05 * torch.randn(24, 1, 12, 12, generator=rng)
    x += ((0.4 - (x - 0.5).flatten(1) @ weight)[:, None] * weight).view_as(x)

    def net(z):
        along = (z - 0.5).flatten(1) @ weight
        return torch.stack([along, -along], 1) / 2

    y = torch.zeros(len(x), dtype=torch.long)
    # between 1 and 1.5 times the radius the search breaks next to nothing here, the authors' no more than ours
    for attack in (SquareTies(queries=600), Square(queries=600)):
        within, beyond = (attack.perturb(net, x, y, ThreatModel(norm="l2", eps=f * 0.4), seed=0).x_adv for f in (0.99, 2))
        assert all(robust(net, within, y)) and sum(robust(net, beyond, y)) <= 4


@pytest.mark.parametrize(
    "shape", [(4, 4), (5, 9), (8, 8), (10, 10), (12, 12), (14, 14), (16, 16), (19, 19), (24, 24), (28, 28), (32, 26), (32, 48)]
)
def test_where_the_authors_grid_leaves_the_image_ours_takes_its_place(shape):
    from pyautoattack.square import SquareAttack

    x, y = torch.full((2, 1, *shape), 0.5), torch.zeros(2, dtype=torch.long)

    def model(z):
        return z.new_tensor([3.0, 0, 0, 0]).repeat(len(z), 1) - z.flatten(1).std(1)[:, None] * z.new_tensor([9.0, 0, 0, 0])

    attack = SquareAttack(model, norm="L2", n_queries=2, eps=1.0, device="cpu", resc_schedule=False)
    attack.init_hyperparam(x)
    try:
        attack.attack_single_run(x, y)
    except (RuntimeError, ZeroDivisionError):
        assert not _grid_fits(*shape)
    else:
        assert _grid_fits(*shape)
    threat = ThreatModel(norm="l2", eps=0.5 * x[0].numel() ** 0.5)
    assert not any(robust(model, Square(queries=20).perturb(model, x, y, threat, seed=0).x_adv, y))


def test_streams_are_spread_evenly():
    x = torch.rand(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    streams = Streams(x, 0)
    assert abs(float(streams.signs(1, 4).mean())) < 0.05
    places = place(streams.words(2, 3)[:, 0], 5)
    assert np.bincount(places, minlength=5).min() > 330
    assert not np.array_equal(streams.words(1, 3), streams.words(2, 3))
    assert not np.array_equal(streams.words(1, 3), Streams(x, 1).words(1, 3))
