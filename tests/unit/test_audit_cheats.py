"""Engines that pretend never pass, and the check that found them out is named; honest ones fire none.

Every cheat of `tests.audit_cheats` as an ONNX file held against the network it wraps, as a checkpoint attacked with its
own gradients, and as a bare file. The floor lies above what the honest body keeps (nothing) at this radius.
"""

import numpy as np
import pytest
import torch

from robustkd.auditing.controls import Unseen
from robustkd.auditing.fresh import Reopen
from robustkd.auditing.graph import rebuild
from robustkd.auditing.run import run_audit
from robustkd.auditing.unseen import unseen_images
from robustkd.engines.ort import OrtEngine
from robustkd.errors import NumericsError
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_cheats import CHEATS, CLASSES, EPS, GRAPHS, Cheating, Counting, Known, Remembering, build, honest
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_run import FACTS

POLICY = Policy(name="test", noise_draws=2, pgd_steps=6, apgd_steps=6, targets=1, square_queries=30)
FLOOR = AuditConfig(tolerance=8, min_robust=20, batch_size=32)
THREAT = ThreatModel(eps=EPS)

#: held against the parent: what must warn or block besides the floor. With the parent's gradients some cheats hide
#: nothing at all: the engine is found to be as weak as it is, and the floor says so
NAMED = {
    "noise": {"S1", "S2"},
    "huge logits": {"S14"},
    "validator": {"S3", "S13"},
    "one-hot": {"S4"},
    "cold softmax": {"S4"},
    "detector": {"S13", "8-bit"},
    "memoriser": {"S13", "S16"},
    "batch statistics": {"S2", "S18"},
    "tiny logits": {"S14"},
    "cached near test images": {"S13", "S16"},
    "change divided by ten": {"S16"},
}
#: as bare files, attacked through their own graph: what must warn or block; where nothing is named, the floor does
BARE = {
    "noise": {"S1"},
    "validator": {"S3"},
    "one-hot": {"S4", "S12"},
    "sinusoid": {"S6"},
    "detector": {"S13"},
    "memoriser": {"S16"},
    "batch statistics": {"S2"},
    "cached near test images": {"S16"},
    "change divided by ten": {"S16"},
}
ALONE_FLOORS = AuditConfig(min_robust=20, min_clean=20, batch_size=32)
PLAIN = {"coarse input", "detached", "sinusoid", "low bits ignored", "fixed noise"}

#: attacked with its own gradients
ALONE = {
    "coarse input": {"S9", "S12", "S13"},
    "noise": {"S1", "S2"},
    "huge logits": {"S14"},
    "detached": {"S9", "S12", "S13"},
    "validator": {"S3", "S13"},
    "one-hot": {"S4", "S12"},
    "cold softmax": {"S4", "S12"},
    "sinusoid": {"S6"},
    "detector": {"S13"},
    "memoriser": {"S12", "S16", "S17"},
    "batch statistics": {"S2", "S18"},
    "tiny logits": {"S14"},
    "low bits ignored": {"S12"},
    "cached near test images": {"S12", "S13"},
    "change divided by ten": {"S16"},
    "equal logits": {"S4"},
    "fixed noise": {"bound:"},
}


@pytest.fixture(scope="module")
def data():
    return images(64)


@pytest.fixture(scope="module")
def known(data):
    return Known(data.floats(), data.labels)


def go(engine, data, **more):
    other = images(64, seed=9)
    values = {"threat": THREAT, "policy": POLICY, "audit": FLOOR, "unseen": Unseen(other.floats(), other.labels), **more}
    result, _ = run_audit(engine, artifact=FACTS, images=data, **values)
    return result


def parent():
    from robustkd.auditing.facts import SourceModel

    return SourceModel(Quadrants(), "checkpoint", "sha256:1")


def fired(result):
    return {check.name.split()[0] for check in result.checks if check.status in ("warn", "block")}


def blocks(result):
    return [check.name for check in result.checks if check.status == "block"]


def test_every_cheat_is_held_against_something():
    assert NAMED.keys() | PLAIN | {"equal logits"} == CHEATS.keys() == ALONE.keys() == GRAPHS.keys() | {"detached"}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_the_cheat_it_stands_for(name, known, data, tmp_path):
    x = data.floats()[:16]
    x = np.concatenate([x, (x + np.random.default_rng(0).uniform(-EPS, EPS, x.shape)).clip(0, 1)]).astype(np.float32)
    with torch.no_grad():
        wanted = CHEATS[name](known)(Quadrants(), torch.from_numpy(x)).numpy()
    engine = OrtEngine(build(name, known, tmp_path / "cheat.onnx"))
    found = engine.logits(x)
    if name == "noise":
        assert not np.allclose(found, engine.logits(x))
    elif name == "sinusoid":  # its phase magnifies the rounding of float32
        assert np.isclose(found, wanted, rtol=0.05, atol=0.05).mean() > 0.9
    else:
        assert np.isclose(found, wanted, rtol=1e-3, atol=1e-3 * np.nanmax(np.abs(wanted)), equal_nan=True).mean() > 0.98


def test_equal_logits_are_another_model_than_the_parent(known, data, tmp_path):
    with pytest.raises(NumericsError, match="parity"):
        go(OrtEngine(build("equal logits", known, tmp_path / "cheat.onnx")), data, source=parent())


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "equal logits"])
def test_an_onnx_file_that_cheats_never_passes_against_its_parent(name, known, data, tmp_path):
    result = go(OrtEngine(build(name, known, tmp_path / "cheat.onnx")), data, source=parent())
    assert result.verdict.status in ("fail", "invalid")
    if name in NAMED:
        assert fired(result) & NAMED[name], blocks(result)
    else:  # nothing left to hide: the truth about the body
        assert result.engine.robust_accuracy.estimate < 0.05 and result.verdict.status == "fail"
    assert result.verdict.reasons and blocks(result)


@pytest.mark.parametrize("name", CHEATS)
def test_a_checkpoint_that_cheats_never_passes_on_its_own_gradients(name, known, data):
    net = Cheating(CHEATS[name](known))
    result = go(TorchEngine(net), data, twin=net)
    assert result.verdict.status in ("fail", "invalid")
    assert fired(result) & ALONE[name], blocks(result)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_bare_file_that_cheats_never_passes(name, known, data, tmp_path):
    file = build(name, known, tmp_path / "cheat.onnx")
    result = go(OrtEngine(file), data, graph=rebuild(file), audit=ALONE_FLOORS)
    assert result.verdict.status in ("fail", "invalid")
    assert fired(result) & BARE.get(name, {"bound:"}), blocks(result)
    assert name == "noise" or {check.name: check.status for check in result.checks}["twin agreement"] != "skipped"


def test_an_honest_bare_file_passes_where_the_cheats_do_not(data, tmp_path):
    file = honest(tmp_path / "honest.onnx")
    result = go(OrtEngine(file), data, graph=rebuild(file), audit=ALONE_FLOORS, threat=ThreatModel(eps=0.03))
    assert not blocks(result) and result.verdict.status == "pass", result.checks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHEATS if name != "equal logits"])
def test_a_torch_engine_that_cheats_never_passes_against_its_parent(name, known, data):
    net = Quadrants()
    result = go(TorchEngine(net, answer=CHEATS[name](known)), data, source=parent())
    assert result.verdict.status in ("fail", "invalid")
    assert name in PLAIN or fired(result) & NAMED[name], blocks(result)


STATEFUL = {
    "honest until the probes are over": (lambda: Counting(2000), Reopen("tests.audit_cheats:open_counting", "2000")),
    "remembers what it was asked": (Remembering, Reopen("tests.audit_cheats:open_remembering", "")),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_an_engine_with_a_memory_is_found_out_by_a_fresh_process(name, data):
    make, reopen = STATEFUL[name]
    result = go(make(), data, source=parent(), reopen=reopen)
    assert result.verdict.status in ("fail", "invalid")
    found = next(check for check in result.checks if check.name.startswith("S18"))
    assert found.status == "block" and "flags changed" in found.message


@pytest.mark.parametrize("radius", [0.04, 0.0])
def test_an_honest_onnx_file_fires_nothing(radius, data, tmp_path):
    file = honest(tmp_path / "honest.onnx")
    policy = POLICY.model_copy(update={"uint8": "native", "effort_images": 16, "effort_steps": 10, "square_ties_queries": 20})
    audit, threat = AuditConfig(tolerance=8, min_robust=20, batch_size=32), ThreatModel(eps=radius)
    reopen = Reopen("robustkd.auditing.fresh:open_file", str(file))
    result = go(OrtEngine(file), data, source=parent(), audit=audit, threat=threat, policy=policy, reopen=reopen)
    assert not fired(result), [check for check in result.checks if check.status != "ok"]
    assert result.verdict.status == "pass"
    last = next(check for check in result.checks if check.name.startswith("S18"))
    assert "fresh process" in last.message


def test_a_file_that_does_not_open_again_is_not_trusted(data, tmp_path):
    file = honest(tmp_path / "honest.onnx")
    reopen = Reopen("robustkd.auditing.fresh:open_file", str(tmp_path / "gone.onnx"))
    result = go(OrtEngine(file), data, source=parent(), threat=ThreatModel(eps=0.04), reopen=reopen)
    assert result.verdict.status == "invalid" and "S18" in fired(result)
    left_out = POLICY.model_copy(update={"fresh_process": False})
    again = go(OrtEngine(file), data, source=parent(), threat=ThreatModel(eps=0.04), reopen=reopen, policy=left_out)
    assert "S18" not in fired(again)


def test_unseen_images_are_none_of_those_shown(tmp_path):
    whole = images(40)
    np.savez(tmp_path / "data.npz", x=whole.images, y=whole.labels)
    shown = whole.take(np.arange(30))
    found = unseen_images(str(tmp_path / "data.npz"), None, shown, 0)
    assert found is not None and len(found.y) == 10 and found.x.dtype == np.float32
    assert not (found.x[:, None] == shown.floats()[None]).all(axis=(2, 3, 4)).any()
    assert unseen_images(str(tmp_path / "data.npz"), None, whole, 0) is None
    assert len(whole.classes) == CLASSES


def test_an_honest_engine_of_labels_is_judged_by_decisions_and_replay(data, tmp_path, known):
    """A one-hot output alone is no crime: with an attack that reads labels it can be judged, and its source leads."""
    policy = POLICY.model_copy(update={"rays_queries": 60})
    engine = OrtEngine(build("one-hot", known, tmp_path / "labels.onnx"))
    audit = AuditConfig(tolerance=8, min_robust=20, batch_size=32)
    result = go(engine, data, source=parent(), threat=ThreatModel(eps=0.04), policy=policy, audit=audit)
    assert result.engine.attacks["rays"].level == "blackbox"
    assert not blocks(result) and "S4" in fired(result) and result.verdict.status == "pass", result.checks
    broken = go(engine, data, source=parent(), policy=policy)
    assert broken.verdict.status == "fail"
