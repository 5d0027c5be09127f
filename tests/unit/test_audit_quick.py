"""What makes attacks quicker changes no verdict: folded networks, one pass for value and gradient, images that leave."""

import numpy as np
import pytest
import torch
from torch import fx, nn

from robustkd.auditing import answers, preparing
from robustkd.auditing.facts import ArtifactFacts, SourceModel
from robustkd.auditing.quick import Enough, Own, White, quick
from robustkd.auditing.run import run_audit
from robustkd.auditing.twin import Surrogate, Values
from robustkd.engines.pytorch import PytorchEngine
from robustkd.models._fold import frozen
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, TorchEngine, images, trained

THREAT = ThreatModel(eps=0.02)
POLICY = Policy(
    name="small",
    noise_draws=1,
    pgd_steps=4,
    apgd_steps=25,
    targets=2,
    fab=False,
    square_queries=40,
    ladder_images=0,
    scale_images=0,
    memory_images=0,
    fresh_process=False,
)


@pytest.fixture(scope="module")
def data():
    return images(64)


@pytest.fixture(scope="module")
def net(data):
    return trained(Conv(seed=1), data, steps=200)


@pytest.fixture(scope="module")
def other(net):
    """The network with its weights rounded coarsely, as an engine of few bits has them."""
    rounded = Conv()
    rounded.load_state_dict({k: (v * 8).round() / 8 if v.is_floating_point() else v for k, v in net.state_dict().items()})
    return rounded.eval()


def audit(engine, data, threat=THREAT, policy=POLICY, **options):
    facts = ArtifactFacts("net.pt", "0" * 64)
    return run_audit(
        engine, artifact=facts, images=data, threat=threat, policy=policy, audit=AuditConfig(batch_size=32), **options
    )


def flags(arrays):
    """Everything a verdict is made of: flags of both sides after every attack, rounding to 8 bit included."""
    ledger = arrays.ledger
    sides = [ledger.engine, *([ledger.source] if ledger.source else [])]
    return {
        (number, name): side.broken([name])
        for number, side in enumerate(sides)
        for name in side.attacks
        if side.tried(name).any()
    }


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def engine_of(net):
    return PytorchEngine(net, input_shape=(1, 8, 8), classes=4)


def calls(result):
    sides = [result.engine, *([result.source_model] if result.source_model else [])]
    return sum(attack.forward_calls for side in sides for attack in side.attacks.values())


@pytest.mark.parametrize("paired", [False, True])
def test_folded_networks_give_the_flags_of_plain_ones(paired, data, net, other, monkeypatch):
    if paired:
        subject, options = TorchEngine(other), {"source": SourceModel(net, "net", "1" * 64)}
    else:
        subject, options = engine_of(net), {"twin": net}
    quickly, arrays = audit(subject, data, **options)
    monkeypatch.setattr(preparing, "quick", lambda net, x, **_: net)
    plainly, plain = audit(subject, data, **options)
    assert 0.1 < arrays.ledger.engine.robust().mean() < arrays.ledger.engine.clean.robust.mean()
    assert same(flags(arrays), flags(plain)) and quickly.verdict == plainly.verdict


def test_a_session_that_answers_gives_the_flags_of_plain_networks(data, net, monkeypatch):
    policy = POLICY.model_copy(update={"square_queries": 600, "fab": True})
    seen = []
    run = answers.Answers.forward
    monkeypatch.setattr(answers.Answers, "forward", lambda self, x: seen.append(len(x)) or run(self, x))
    quickly, arrays = audit(engine_of(net), data, policy=policy, twin=net)
    assert len(seen) > 600
    monkeypatch.setattr(preparing, "quick", lambda net, x, **_: net)
    plainly, plain = audit(engine_of(net), data, policy=policy, twin=net)
    assert same(flags(arrays), flags(plain)) and quickly.verdict == plainly.verdict


def test_a_session_answers_alike_in_any_batch_and_has_the_gradient_of_torch(data, net):
    x = torch.from_numpy(data.floats()[:40])
    found, folded = quick(net, x, asked=lambda net: 1), frozen(net)
    assert isinstance(found, answers.Answers) and not isinstance(quick(net, x), answers.Answers)
    with torch.no_grad():
        torch.testing.assert_close(found(x), net(x), rtol=1e-4, atol=1e-5)
        for size in (1, 3, 16, 39):
            assert torch.equal(found(x[:size]), found(x)[:size])
    slopes = []
    for model in (found, folded):
        z = x.clone().requires_grad_(True)
        slopes.append(torch.autograd.grad(model(z).square().sum(), z)[0])
    assert torch.equal(*slopes)


def test_without_a_session_torch_answers(data, net, monkeypatch):
    x = torch.from_numpy(data.floats()[:8])

    def refused(*_, **__):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(answers, "open_session", refused)
    assert isinstance(quick(net, x, asked=lambda net: 1), fx.GraphModule)
    double = frozen(Conv().double().eval())
    assert answers.answers(double, x.double(), lambda net: 1) is double
    wide = frozen(nn.Sequential(nn.Conv2d(160, 160, 3, padding=1), nn.BatchNorm2d(160)).eval())
    assert answers.answers(wide, torch.rand(2, 160, 8, 8), lambda net: 1) is wide, "Winograd's way is quicker still"


def test_a_session_that_answers_otherwise_is_not_taken(data, net, monkeypatch):
    x = torch.from_numpy(data.floats()[:8])
    monkeypatch.setattr(answers.Answers, "forward", lambda self, x: self.net(x) * 1.01)
    assert isinstance(quick(net, x, asked=lambda net: 1), fx.GraphModule)


def test_images_that_leave_lose_no_flag_on_either_side(data, net, other, monkeypatch):
    source = SourceModel(net, "net", "1" * 64)
    wide = ThreatModel(eps=0.05)
    left, arrays = audit(TorchEngine(other), data, wide, source=source)
    monkeypatch.setattr(Enough, "__call__", lambda self, z, rows: torch.zeros(len(z), dtype=torch.bool))
    stayed, all_along = audit(TorchEngine(other), data, wide, source=source)
    assert same(flags(arrays), flags(all_along)) and left.verdict == stayed.verdict
    assert calls(left) < calls(stayed), "what the judges are asked on the way is less than what the attacks save"


def test_a_network_that_is_engine_and_twin_is_asked_once(data, net):
    x = torch.from_numpy(data.floats()[:5])
    plain = preparing.models_of(engine_of(net), net, None, None, "logits", x, random=False, exact=True)["surrogate"]
    wrapped = preparing.models_of(TorchEngine(net), net, None, None, "logits", x, random=False, exact=True)["surrogate"]
    assert isinstance(plain, White) and isinstance(plain.values, Own)
    assert isinstance(wrapped, Surrogate) and not isinstance(wrapped, White) and isinstance(wrapped.values, Values)
    logits, slopes = [], []
    for model in (plain, wrapped):
        z = x.clone().requires_grad_(True)
        logits.append(model(z))
        slopes.append(torch.autograd.grad(logits[-1].square().sum(), z)[0])
    assert torch.equal(*logits) and torch.equal(*slopes)
    assert plain.values.images > 0


class Backwards(nn.Module):
    """Answers every image by the class it is least like."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return -self.net(x)


def test_a_folded_network_that_falls_before_the_judge_is_not_believed(data, net, monkeypatch):
    expected, plain = audit(engine_of(net), data, twin=net)
    monkeypatch.setattr(preparing, "quick", lambda net, x, **_: fx.symbolic_trace(Backwards(net)))
    result, arrays = audit(engine_of(net), data, twin=net)
    assert np.array_equal(arrays.ledger.engine.robust(), plain.ledger.engine.robust())
    assert result.engine.robust_accuracy == expected.engine.robust_accuracy


class Noisy(nn.Module):
    """Random in a way that tracing would freeze."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.05 * torch.randn(1, 1, 8, 8))


def test_only_networks_that_answer_alike_are_folded(data, net):
    x = torch.from_numpy(data.floats()[:16])
    assert isinstance(quick(net, x), fx.GraphModule)
    with torch.no_grad():
        assert torch.allclose(quick(net, x)(x), net(x), atol=1e-4)
    noisy, bare = Noisy(net).eval(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    assert quick(noisy, x) is noisy and quick(bare, x) is bare
