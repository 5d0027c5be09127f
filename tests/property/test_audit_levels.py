"""Invariants of whole audits: every attack of the shelf at every level, in both norms, judged anew from what was stored."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustkd.auditing.facts import SourceModel
from robustkd.auditing.graph import Graph
from robustkd.auditing.ledger import distances
from robustkd.auditing.merge import complete, finished, shard_folder, write_shard
from robustkd.auditing.run import Order, carry_out, carry_out_shard
from robustkd.auditing.shards import Shard
from robustkd.auditing.sides import read
from robustkd.auditing.summary import EIGHT_BIT
from robustkd.catalog import Shelf
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_resume import plain
from tests.unit.test_audit_run import FACTS

QUERIES = {name: 15 for name in Policy.model_fields if name.endswith("_queries")}
ALWAYS = {name: True for name in Policy.model_fields if name.endswith("_always")}
EVERYTHING = Policy(
    name="everything", noise_draws=2, pgd_steps=3, apgd_steps=4, targets=1, twins=2, fab=True, uint8="native",
    ladder_images=0, scale_images=0, memory_images=0, **QUERIES, **ALWAYS,
)  # fmt: skip
EPS = {"linf": 0.04, "l2": 0.25}
NORMS = sorted(EPS)
#: made for each side by itself: random draws, and what the other attacks found rounded to 8 bit
OWN_POOL = ("noise", EIGHT_BIT[0])


class Coarse(TorchEngine):
    """Logits in steps, few as an int8 engine returns them."""

    def __init__(self) -> None:
        super().__init__(Quadrants(), answer=lambda net, x: (net(x) / 1.5).round() * 1.5)


class Twin(Quadrants):
    """The graph of such an engine: the same values, roundings passed straight through."""

    def forward(self, x):
        z = super().forward(x)
        return z + ((z / 1.5).round() * 1.5 - z).detach()


def order(norm, *, seed=0, n=14, size=6, eps=None, **more):
    values = {
        "artifact": FACTS,
        "images": images(n, seed=seed % 5),
        "threat": ThreatModel(norm=norm, eps=EPS[norm] if eps is None else eps),
        "policy": EVERYTHING,
        "audit": AuditConfig(tolerance=8, batch_size=size),
        "source": SourceModel(Quadrants(), "s", "sha256:1"),
        "graph": Graph(Twin()),
        "seed": seed,
        **more,
    }
    return Order(values.pop("engine", None) or Coarse(), **values)


@pytest.fixture(scope="module", params=NORMS)
def done(request):
    asked = order(request.param)
    return (asked, *carry_out(asked))


def stored(arrays):
    """Every chunk of every attack: its name and what was kept of it."""
    for name in sorted(arrays.store.names()):
        piece = arrays.store.get(name)
        if "x_adv" in piece:
            yield name.rsplit("-", 1)[0], piece


def test_every_attack_of_the_shelf_runs_at_its_levels(done):
    asked, result, arrays = done
    names = {name.split(":")[-1] for name in result.engine.attacks}
    able = {name for name in Shelf("attacks").names() if asked.threat.norm in Shelf("attacks").get(name).norms}
    assert names >= able | {EIGHT_BIT[0]}, able - names
    assert {attack.level for attack in result.engine.attacks.values()} == {"baseline", "surrogate", "replay", "blackbox"}
    assert any(name.startswith("twin:") for name in result.engine.attacks)
    tried = {piece["index"].size for _, piece in stored(arrays)}
    assert min(tried) > 0


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(NORMS), st.integers(0, 10_000), st.sampled_from([0.3 / 255, 4 / 255, 0.031, 0.6]))
def test_every_stored_image_lies_in_the_ball_and_shows_its_flag(norm, seed, eps):
    """Invariants 1, 3 and 4, on the images of every attack, not on the worst ones alone."""
    asked = order(norm, seed=seed, n=9, eps=eps * (1 if norm == "linf" else 4))
    pixels = np.array(asked.images.images)
    _, arrays = carry_out(asked)
    assert np.array_equal(asked.images.images, pixels) and np.array_equal(arrays.x, asked.images.floats())
    engine, source = Coarse(), TorchEngine(Quadrants())
    track, other = arrays.ledger.engine, arrays.ledger.source
    wrong = ~track.clean.robust & ~other.clean.robust
    seen = 0
    for name, piece in stored(arrays):
        x_adv, index = piece["x_adv"], piece["index"]
        assert x_adv.dtype == np.float32 and x_adv.shape == arrays.x[index].shape and np.isfinite(x_adv).all(), name
        assert x_adv.min() >= 0 and x_adv.max() <= 1, name
        assert (distances(x_adv, arrays.x[index], norm) <= asked.threat.eps + 1e-6).all(), name
        assert not wrong[index].any(), name
        again = read(engine.logits(x_adv), arrays.y[index])
        assert np.array_equal(again.robust, piece["engine_margin"] > 0), name
        if name not in OWN_POOL:
            judged = read(source.logits(x_adv), arrays.y[index])
            assert np.array_equal(judged.robust, piece["source_margin"] > 0), name
        seen += len(index)
    assert seen > 0 and arrays.ledger.outside == 0
    assert not (track.robust() & ~track.clean.robust).any() and not (other.robust() & ~other.clean.robust).any()
    missed = ~track.clean.robust
    assert np.array_equal(arrays.ledger.worst[missed], arrays.x[missed])


def test_the_worst_case_is_the_and_over_every_level(done):
    """Invariant 5: on both sides, and no level and no attack lies below it."""
    _, result, arrays = done
    for side, track in ((result.engine, arrays.ledger.engine), (result.source_model, arrays.ledger.source)):
        expected = track.clean.robust.copy()
        for name, judged in track.attacks.items():
            expected &= ~track.tried(name) | judged.robust
        assert np.array_equal(track.robust(), expected)
        assert side.robust_accuracy.estimate == pytest.approx(expected.mean())
        left = [attack.robust_accuracy for attack in side.attacks.values()]
        assert left == sorted(left, reverse=True) and left[-1] == side.robust_accuracy.estimate
        assert side.robust_accuracy.estimate <= side.clean_accuracy.estimate


@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_changes_no_image(norm):
    """Invariant 2, at every level."""
    result, arrays = carry_out(order(norm, eps=0.0))
    assert result.engine.robust_accuracy == result.engine.clean_accuracy
    for name, piece in stored(arrays):
        assert np.array_equal(piece["x_adv"], arrays.x[piece["index"]]), name


def equal(one, other):
    """Two audits, image by image of every attack."""
    assert one[1].store.names() == other[1].store.names()
    for (name, first), (_, second) in zip(stored(one[1]), stored(other[1]), strict=True):
        for key in first.keys() - {"seconds"}:
            assert np.array_equal(first[key], second[key]), (name, key)
    assert plain(one[0]) == plain(other[0])


def test_the_same_seed_gives_the_same_bits_and_leaves_no_trace(done):
    """Invariant 8, whatever ran before; another seed starts elsewhere."""
    asked, *first = done
    net = Quadrants().train()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = carry_out(order(asked.threat.norm, source=SourceModel(net, "s", "sha256:1")))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert net.training and net.gain.requires_grad and net.gain.grad is None
    equal(first, again)
    other = carry_out(order(asked.threat.norm, seed=5))  # the same images, for they hang on seed % 5
    changed = {
        name
        for (name, a), (_, b) in zip(stored(first[1]), stored(other[1]), strict=False)
        if a["x_adv"].shape == b["x_adv"].shape and not np.array_equal(a["x_adv"], b["x_adv"])
    }
    assert {"noise", "pgd"} <= changed


def test_modes_and_gradients_are_given_back_after_an_exception(done):
    asked = done[0]
    for calls in (3, 12, 30):
        net, source = Quadrants().train(), Quadrants().train()
        engine = Coarse()
        honest, left = engine.logits, [calls]

        def failing(x, honest=honest, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("gone")
            return honest(x)

        engine.logits = failing
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="gone"):
            carry_out(order(asked.threat.norm, engine=engine, source=SourceModel(source, "s", "sha256:1"), graph=Graph(net)))
        assert torch.equal(torch.get_rng_state(), state)
        for one in (net, source):
            assert one.training and one.gain.requires_grad and one.gain.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_batch_size_and_order_change_no_flag(norm):
    """Invariant 9, with every attack but the authors' Square, which draws for its batch."""
    alone = EVERYTHING.model_copy(update={"square_queries": 0})
    assert {n for n in Shelf("attacks").names() if not Shelf("attacks").get(n).per_image} == {"square"}

    def flags(size, index):
        asked = order(norm, size=size, policy=alone)
        track = carry_out(replace(asked, images=asked.images.take(index)))[1].ledger.engine
        assert set(track.attacks) > {"noise", "pgd", "apgd-ce", "apgd-t", "twin:apgd-t", "replay:fab-t", "apgd-grid"}
        return {name: judged.margin > 0 for name, judged in track.attacks.items()} | {"all": track.robust()}

    straight, mixed = np.arange(14), np.random.default_rng(0).permutation(14)
    whole = flags(64, straight)
    assert 0 < whole["all"].sum() < 14
    for size, index in ((1, straight), (7, straight), (5, mixed), (64, mixed)):
        found = flags(size, index)
        assert found.keys() == whole.keys()
        for name in whole:
            assert np.array_equal(found[name], whole[name][index]), (name, size)


@pytest.mark.parametrize("norm", NORMS)
def test_two_shards_in_any_order_are_the_whole(norm, tmp_path):
    """Invariant 9, with every attack."""
    whole = carry_out(order(norm, folder=None))
    for number in (2, 1):
        part = Shard(number, 2)
        home = shard_folder(tmp_path / "audit", part)
        write_shard(carry_out_shard(order(norm, folder=home), part), tmp_path / "audit", part, None)
    merged = carry_out(order(norm, folder=tmp_path / "audit", resume=True, shards=complete(finished([tmp_path / "audit"]))))
    assert plain(merged[0]) == plain(whole[0])
    assert np.array_equal(merged[1].ledger.worst, whole[1].ledger.worst)


def test_forward_calls_are_what_each_side_received(done):
    """Invariant 17: an audit whose only work is its attacks asks the engine as often as its attacks say, plus the probes."""
    asked = done[0]
    fewer = asked.policy.model_copy(update=dict.fromkeys(QUERIES, 0))
    counted = {}
    for name, policy in (("all", asked.policy), ("fewer", fewer)):
        engine = Coarse()
        found, _ = carry_out(order(asked.threat.norm, engine=engine, policy=policy))
        counted[name] = engine.images - sum(a.forward_calls for a in found.engine.attacks.values())
    assert counted["all"] == counted["fewer"]  # what is left are the checks, the same in both
