"""Chunks that are attacked at once yield what they yield alone, to the last bit; what may keep a state has one thread."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from robustkd.attacks._base import isolated
from robustkd.attacks._guard import Guard
from robustkd.attacks.square import Square
from robustkd.auditing import beside, steps
from robustkd.auditing.beside import fitting, held, room, side_by_side
from robustkd.auditing.facts import ArtifactFacts, SourceModel
from robustkd.auditing.quick import quick
from robustkd.auditing.run import run_audit
from robustkd.auditing.twin import Values
from robustkd.catalog import Shelf
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import Interrupted
from robustkd.recipe.policy import AuditConfig
from robustkd.threat import ThreatModel
from tests.attacked import THREATS, batch, victim
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_attacks import SMALL, make
from tests.unit.test_audit_graph import write
from tests.unit.test_audit_resume import plain
from tests.unit.test_audit_shards import POLICY

CPU = torch.device("cpu")
ALL = POLICY.model_copy(update={"fab": True, "square_queries": 500})
"""So many questions that a session of ONNX Runtime answers them."""


@pytest.fixture(autouse=True)
def cores():
    """As on a machine of three cores, whatever this one has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seen(monkeypatch):
    """How many chunks were attacked at once, for each attack."""
    found = []

    def told(do, items, workers):
        found.append(min(workers, len(items)))
        return side_by_side(do, items, workers)

    monkeypatch.setattr(steps, "side_by_side", told)
    return found


def audit(engine, threat, **options):
    given = {"policy": POLICY, **options}
    facts, config = ArtifactFacts("net.pt", "0" * 64), AuditConfig(batch_size=16)
    return run_audit(engine, artifact=facts, images=images(64), threat=threat, audit=config, **given)


def both(monkeypatch, engine, threat, **options):
    """The audit with chunks at once, and one after another."""
    found = audit(engine(), threat, **options)
    monkeypatch.setattr(beside, "MOST", 1)
    return found, audit(engine(), threat, **options)


def same(found, again):
    (result, arrays), (other, others) = found, again
    assert plain(result) == plain(other)
    assert arrays.store.names() == others.store.names()
    for name in arrays.store.names():
        piece, its = arrays.store.get(name), others.store.get(name)
        assert all(np.array_equal(piece[key], its[key], equal_nan=True) for key in piece if key != "seconds"), name


@pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2"])
def test_a_network_that_is_its_own_engine(threat, monkeypatch, seen):
    net = victim()

    def engine():
        return PytorchEngine(net, input_shape=(1, 8, 8), classes=4)

    same(*both(monkeypatch, engine, threat, twin=net, policy=ALL))
    half = len(seen) // 2
    assert max(seen[:half]) == 3 and max(seen[half:]) == 1


@pytest.mark.parametrize("source", [True, False])
def test_an_onnx_file(tmp_path, monkeypatch, seen, source):
    file = write(victim(), tmp_path / "net.onnx")
    given = {"source": SourceModel(victim(), "s", "1" * 64)} if source else {}
    same(*both(monkeypatch, lambda: OrtEngine(file, threads=1), THREATS[0], **given))
    assert max(seen[: len(seen) // 2]) == 3 and max(seen[len(seen) // 2 :]) == 1


def test_a_users_own_engine_or_network_is_asked_by_one_thread_alone(seen):
    audit(TorchEngine(victim()), THREATS[0], source=SourceModel(victim(), "s", "1" * 64))
    net = Quadrants().requires_grad_(False)
    audit(PytorchEngine(net, input_shape=(1, 8, 8), classes=4), THREATS[0], twin=net)
    assert max(seen) == 1


def test_which_models_several_threads_may_ask():
    x, _ = batch(8)
    net = victim()

    def several(*models):
        return fitting(models, x, 8, 3)

    assert (
        several(quick(net, x))
        == several(quick(net, x, asked=lambda net: 1))
        == several(quick(net, x), quick(net, x, asked=lambda net: 1))
        == 3
    )
    for model in (net, Values(TorchEngine(net)), torch.fx.symbolic_trace(net), lambda x: net(x)):
        assert several(model) == several(quick(net, x), model) == 1
    wide = nn.Sequential(nn.Conv2d(1, 160, 3), nn.Conv2d(160, 160, 3, padding=1), nn.BatchNorm2d(160), nn.Flatten())
    assert several(quick(wide.eval().requires_grad_(False), x)) == 1, "its operators are long enough to be shared"


def test_large_chunks_have_all_threads_for_themselves(monkeypatch):
    x, _ = batch(8)
    net = quick(victim(), x)
    monkeypatch.setattr(beside, "SMALL", 100 * held(net, x))
    assert (fitting([net], x, 100, 3), beside.threads(net, x, 100, 3)) == (3, 1)
    assert (fitting([net], x, 101, 3), beside.threads(net, x, 101, 3)) == (1, 3)
    assert fitting([net, lambda z: z], x, 100, 3) == 1


def test_what_an_image_holds_is_what_its_gradient_needs():
    x = torch.rand(8, 1, 8, 8)
    assert held(nn.Sequential(nn.ReLU(), nn.Flatten()), x) == 64 * 4, "the answer of the ReLU, once"
    assert held(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Flatten()), x) == 2 * 64 * 4


def test_room_is_for_full_chunks_on_a_cpu(monkeypatch):
    assert room([16, 16, 16, 2], 16, CPU) == 3
    assert room([16, 16], 16, CPU) == 2
    assert room([16, 2], 16, CPU) == room([2], 16, CPU) == room([], 16, CPU) == 1
    assert room([16] * 9, 16, torch.device("cuda")) == 1
    torch.set_num_threads(64)
    assert room([16] * 9, 16, CPU) == beside.MOST
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    assert room([16] * 9, 16, CPU) == 1


def test_threads_are_divided_and_given_back():
    torch.set_num_threads(6)
    met = threading.Barrier(2, timeout=60)

    def inside(item):
        met.wait()
        return item, torch.get_num_threads()

    assert sorted(side_by_side(inside, range(4), 2)) == [(item, 3) for item in range(4)]
    assert torch.get_num_threads() == 6
    fresh = []
    asking = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    asking.start()
    asking.join()
    assert fresh == [6], "so do threads that come later"


def test_one_failure_stops_what_has_not_begun():
    begun = []

    def broken(item):
        begun.append(item)
        if item == 0:
            raise ValueError("broken")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="broken"):
        list(side_by_side(broken, range(50), 2))
    assert len(begun) < 10 and torch.get_num_threads() == 3


def test_a_signal_stops_all_of_them_and_what_is_finished_is_kept(tmp_path, monkeypatch, seen):
    from robustkd import signals
    from robustkd.auditing import run

    net, told = victim(), []

    def stop(event):
        told.append(event)
        if len(told) == 6:
            signals._received.append(15)

    def go(**options):
        engine = PytorchEngine(net, input_shape=(1, 8, 8), classes=4)
        return audit(engine, THREATS[0], twin=net, folder=tmp_path / "audit", **options)

    try:
        with pytest.raises(Interrupted):
            go(progress=stop)
    finally:
        signals._received.clear()
    kept = len(list(tmp_path.glob(".audit.partial/*.npz")))
    assert kept >= 6 and max(seen) == 3
    resumed = go(resume=True)
    monkeypatch.setattr(run, "room", lambda *_: 1)
    same(resumed, audit(PytorchEngine(net, input_shape=(1, 8, 8), classes=4), THREATS[0], twin=net))


def test_random_states_and_flags_are_as_before():
    net = victim()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    audit(PytorchEngine(net, input_shape=(1, 8, 8), classes=4), THREATS[0], twin=net)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("name", Shelf("attacks").names())
@pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2"])
def test_no_attack_draws_from_a_state_that_all_threads_share(name, threat, monkeypatch):
    from robustkd.attacks import _base

    if threat.norm not in Shelf("attacks").get(name).norms:
        pytest.skip("it does not know this norm")
    assert name in SMALL
    x, y = batch(24)
    found = make(name).perturb(victim(), x, y, threat, seed=3).x_adv
    monkeypatch.setattr(_base, "isolated", lambda seed: isolated(seed + 1))
    assert torch.equal(make(name).perturb(victim(), x, y, threat, seed=3).x_adv, found)


@pytest.mark.parametrize("threat", [THREATS[0], ThreatModel(norm="l2", eps=0.5)], ids=["linf", "l2"])
def test_square_asks_what_the_authors_code_asks(threat):
    from pyautoattack.square import SquareAttack

    x, y = batch(24)
    options = {"n_queries": 150, "p_init": 0.8, "resc_schedule": False, "device": CPU, "eps": threat.eps, "verbose": False}
    asked = {"theirs": [], "ours": []}

    def guard(who):
        made = Guard(lambda z: asked[who].append(z.clone()) or victim()(z), x, y, threat)
        made.untie()
        return made

    for seed in (0, 7):
        with isolated(seed), torch.no_grad():
            norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
            theirs = SquareAttack(guard("theirs"), norm=norm, n_restarts=1, seed=seed, **options).perturb(x, y)
            ours = Square(queries=150)._search(guard("ours"), x, y, threat, seed)
        assert torch.equal(ours, theirs) and not torch.equal(ours, x)
    assert len(asked["ours"]) == len(asked["theirs"]) > 300
    assert all(map(torch.equal, asked["ours"], asked["theirs"]))
