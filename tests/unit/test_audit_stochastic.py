"""Random engines: undeclared they are blocked; declared, the majority of 16 draws judges, and the mean leads attacks."""

import json

import numpy as np
import pytest
import torch

from robustkd.auditing.fresh import Reopen
from robustkd.auditing.run import run_audit
from robustkd.auditing.sides import read
from robustkd.auditing.stochastic import DRAWS, Mean, majority_side, side_of_engine, votes
from robustkd.auditing.twin import Expectation, varies
from robustkd.auditing.verb import audit, audit_shard
from robustkd.cli.app import run as command
from robustkd.errors import ConfigError, Interrupted
from robustkd.reporting.markdown import summary
from robustkd.threat import ThreatModel
from tests.audit_cheats import CHEATS, Cheating, Counting, Known, build
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_cheats import EPS, FACTS, FLOOR, POLICY, blocks, fired, go, parent

CALM = POLICY.model_copy(update={"square_queries": 20, "ladder_images": 16, "scale_images": 16, "memory_images": 16})
MEMORY = Reopen("tests.audit_cheats:open_counting", "40000")
DECLARED = FLOOR.model_copy(update={"stochastic": True})


@pytest.fixture(scope="module")
def data():
    return images(64)


def noisy(sigma, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return TorchEngine(Quadrants(), answer=lambda net, x: net(x + sigma * torch.randn(x.shape, generator=rng)))


def test_undeclared_randomness_is_blocked_and_says_what_to_do(data):
    result = go(noisy(0.25), data, source=parent(), policy=CALM)
    first = next(check for check in result.checks if check.name.startswith("S1 "))
    assert first.status == "block" and "--stochastic" in first.message
    assert result.verdict.status in ("fail", "invalid") and result.engine.per_draw is None


def test_declared_and_undefended_fails_by_majority(data):
    result = go(noisy(0.25), data, source=parent(), policy=CALM, audit=DECLARED)
    assert result.verdict.status == "fail" and "S1" in fired(result), result.verdict
    assert result.engine.robust_accuracy.estimate < 0.1, "noise is no defence once its mean is attacked"
    one = result.engine.per_draw
    assert one.draws == DRAWS and one.robust_accuracy < one.clean_accuracy < 1
    assert result.engine.clean_accuracy.estimate >= one.clean_accuracy, "the majority is right more often than one draw"
    assert "file, one draw" in summary(result) and result.policy["bounds"]["stochastic"] is True


def test_declared_on_its_own_random_gradients_fails_too(data):
    net = Cheating(CHEATS["noise"](Known(data.floats(), data.labels)))
    result = go(TorchEngine(net), data, twin=net, policy=CALM, audit=DECLARED)
    assert result.verdict.status == "fail" and result.engine.robust_accuracy.estimate < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_strong_noise_is_no_reason_to_block(data, seed):
    """Votes of a very random engine change a lot by chance: the verdict may stay open, the checks stay quiet."""
    result = go(noisy(0.1, seed), data, source=parent(), threat=ThreatModel(eps=0.03), policy=CALM, audit=DECLARED)
    assert not [name for name in blocks(result) if not name.startswith("bound")], result.checks


def test_a_memory_is_found_out_though_declared_random(data):
    """Other answers once the probes are over are more than chance."""
    result = go(Counting(40_000), data, source=parent(), policy=CALM, audit=DECLARED, reopen=MEMORY)
    found = next(check for check in result.checks if check.name.startswith("S18"))
    assert found.status == "block" and result.verdict.status in ("fail", "invalid")


def test_declared_and_honest_passes(data):
    """A little noise, a small radius: nothing in the audit may blame the engine for answers that differ by chance."""
    lax = DECLARED.model_copy(update={"tolerance": 15.0})
    result = go(noisy(0.02), data, source=parent(), threat=ThreatModel(eps=0.03), policy=CALM, audit=lax)
    assert result.verdict.status == "pass" and not blocks(result), [c for c in result.checks if c.status != "ok"]
    assert fired(result) <= {"S1", "S11", "S14", "S18"}


def test_an_engine_that_is_declared_but_not_random_is_judged_as_before(data):
    plain = go(TorchEngine(Quadrants()), data, source=parent(), policy=CALM, threat=ThreatModel(eps=0.05), audit=FLOOR)
    same = go(TorchEngine(Quadrants()), data, source=parent(), policy=CALM, threat=ThreatModel(eps=0.05), audit=DECLARED)
    assert same.engine.robust_accuracy == plain.engine.robust_accuracy and same.verdict.status == plain.verdict.status
    assert same.engine.per_draw.clean_accuracy == same.engine.clean_accuracy.estimate
    calls = [sum(a.forward_calls for a in r.engine.attacks.values()) for r in (plain, same)]
    # an image that might answer otherwise next time leaves no attack early
    assert calls[1] % DRAWS == 0 and calls[1] / DRAWS == pytest.approx(calls[0], rel=0.1)


def test_votes_are_a_strict_majority_and_no_number_is_never_robust():
    answers = iter(np.array([[[2, 1, 0]], [[0, 1, 0]], [[0, 3, 1]], [[9, 0, 0]]], np.float32))
    share = votes(lambda x: next(answers), 4)(np.zeros((1, 1, 2, 2), np.float32))
    assert share.tolist() == [[0.5, 0.5, 0.0]]
    assert not read(share, np.array([0])).robust[0], "a tie of votes is no point for the defender"
    bad = iter([np.array([[1, 0]], np.float32), np.array([[np.nan, 0]], np.float32)])
    assert not read(votes(lambda x: next(bad), 2)(np.zeros((1, 1, 2, 2), np.float32)), np.array([0])).robust[0]


def test_the_mean_of_draws_and_of_their_gradients():
    engine, x = noisy(0.3), images(8).floats()
    net = Quadrants()
    with torch.no_grad():
        wanted = net(torch.from_numpy(x)).numpy()
    away = [np.abs(found - wanted).mean() for found in (Mean(engine, 64).logits(x), engine.logits(x))]
    assert away[0] < away[1] / 4
    random = Cheating(CHEATS["noise"](Known(x, np.zeros(8, np.int64))))
    z = torch.from_numpy(x)
    assert varies(random, z) and not varies(net, z)
    spread = [torch.stack([other(z).detach() for _ in range(8)]).std(0).mean() for other in (random, Expectation(random, 16))]
    assert spread[1] < spread[0] / 2


def test_sides_count_one_answer_for_all_draws(data):
    side = side_of_engine(noisy(0.1), 16, stochastic=True)
    side.judge(data.floats()[:20], data.labels[:20])
    assert side.images == 20 and side.draws == DRAWS and side.scores is not side
    assert majority_side(side.logits, 8).scores.slack > 0


class Stopping(TorchEngine):
    left = 10**9

    def logits(self, x):
        self.left -= 1
        if self.left < 0:
            raise Interrupted(15)
        return super().logits(x)


def test_an_interrupted_audit_keeps_the_clean_answers(data, tmp_path):
    def order(calls):
        engine = Stopping(Quadrants(), answer=noisy(0.25).answer)
        engine.left = calls
        return {"engine": engine, "artifact": FACTS, "images": data, "threat": ThreatModel(eps=EPS), "policy": CALM} | {
            "audit": DECLARED,
            "source": parent(),
            "folder": tmp_path / "audit",
        }

    with pytest.raises(Interrupted):
        run_audit(**order(600))
    with np.load(tmp_path / ".audit.partial" / "clean.npz") as kept:
        margins = kept["margin"]
    result, arrays = run_audit(**order(10**9), resume=True)
    assert np.array_equal(arrays.ledger.engine.clean.margin, margins) and result.verdict.status == "fail"


def test_through_the_command_with_a_fresh_process(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("noise", Known(data.floats(), data.labels), tmp_path / "noise.onnx")
    np.savez(tmp_path / "data.npz", x=data.images, y=data.labels)
    (tmp_path / "p.yaml").write_text(
        "noise_draws: 2\npgd_steps: 3\napgd_steps: 4\ntargets: 1\nsquare_queries: 20\n"
        "ladder_images: 0\nscale_images: 0\nmemory_images: 0\n"
    )
    options = ["--dataset", "data.npz", "--eps", str(EPS), "--policy", "p.yaml", "--n", "32", "--min-robust", "95"]
    undeclared = command(["audit", "noise.onnx", *options, "--output", "a"])
    assert undeclared in (10, 12)
    declared = command(["audit", "noise.onnx", *options, "--output", "b", "--stochastic"])
    out = capsys.readouterr().out
    assert declared == 10 and "attacked, one draw" in out
    checks = {check["name"]: check for check in json.loads((tmp_path / "b" / "result.json").read_text())["checks"]}
    assert checks["S1 deterministic"]["status"] == "warn" and checks["S18 re-judging"]["status"] in ("ok", "warn")


def test_what_a_random_engine_cannot_be_asked(tmp_path, data):
    file = build("noise", Known(data.floats(), data.labels), tmp_path / "noise.onnx")
    with pytest.raises(ConfigError, match="kit"):
        audit(file, eps="8/255", stochastic=True, save_kit=tmp_path / "kit.npz")
    with pytest.raises(ConfigError, match="shard"):
        audit_shard(file, "1/2", eps="8/255", stochastic=True)
