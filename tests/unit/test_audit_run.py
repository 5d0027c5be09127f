"""Whole audits of small engines: invariants, honest nets pass, cheating ones never do and are named."""

import numpy as np
import pytest
import torch

from robustkd.auditing.controls import Unseen
from robustkd.auditing.ledger import distances
from robustkd.auditing.run import ArtifactFacts, SourceModel, run_audit
from robustkd.auditing.sides import read
from robustkd.errors import ArtifactError, NumericsError
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, Quadrants, TorchEngine, images, linear, trained

SMALL = Policy(name="test", noise_draws=4, pgd_steps=6, apgd_steps=10, targets=2, square_queries=80)
LAX = AuditConfig(tolerance=8, batch_size=24)
FACTS = ArtifactFacts("x.onnx", "sha256:0")


@pytest.fixture(scope="module")
def data():
    return images(64)


def go(engine, data, *, source=None, twin=None, threat=None, policy=SMALL, audit=LAX, **more):
    if source is not None:
        source = SourceModel(source, "checkpoint", "sha256:1")
    threat = threat or ThreatModel(eps=0.04)
    more = {"unseen": unseen(data), **more}
    return run_audit(
        engine, artifact=FACTS, images=data, threat=threat, policy=policy, audit=audit, source=source, twin=twin, **more
    )


def unseen(data):
    other = images(64, classes=len(data.classes), seed=9)
    return Unseen(other.floats(), other.labels)


def statuses(result, status):
    return {check.name.split()[0] for check in result.checks if check.status == status}


@pytest.fixture(scope="module")
def honest(data):
    return go(TorchEngine(Quadrants()), data, source=Quadrants())


def test_an_honest_net_passes_and_fires_no_block(honest):
    result, _ = honest
    assert result.verdict.status == "pass", result.verdict.reasons
    assert not statuses(result, "block") and not statuses(result, "warn")
    assert {c.name.split()[0] for c in result.checks} >= {f"S{number}" for number in range(1, 19)}
    assert result.difference.b == result.difference.c == 0 and result.difference.mcnemar_p == 1
    assert 0.2 < result.engine.robust_accuracy.estimate < result.engine.clean_accuracy.estimate


@pytest.mark.parametrize("factor", [40.0, 1e4])
def test_an_honest_net_of_huge_logits_passes_with_a_warning(data, factor):
    net = Quadrants(gain=60.0 * factor)
    result, _ = go(TorchEngine(net), data, source=net, policy=SMALL.model_copy(update={"targets": 0, "square_queries": 20}))
    assert result.verdict.status == "pass" and statuses(result, "warn") <= {"S14"}, result.checks


def test_levels_and_counts(honest):
    result, _ = honest
    levels = {name: attack.level for name, attack in result.engine.attacks.items()}
    assert levels == {
        "noise": "baseline",
        "pgd": "surrogate",
        "apgd-ce": "surrogate",
        "apgd-t": "surrogate",
        "replay:apgd-ce": "replay",
        "replay:apgd-t": "replay",
        "square": "blackbox",
        "uint8-post": "blackbox",
    }
    left = [a.robust_accuracy for a in result.engine.attacks.values()]
    assert left == sorted(left, reverse=True) and left[-1] == result.engine.robust_accuracy.estimate
    total = sum(a.broken for a in result.engine.attacks.values())
    assert result.engine.clean_accuracy.estimate - total / 64 <= left[-1] + 1e-9
    assert set(result.source_model.attacks) == set(result.engine.attacks)


def test_wrong_when_clean_is_never_attacked_and_never_robust(honest, data):
    _, arrays = honest
    track = arrays.ledger.engine
    wrong = ~track.clean.robust
    assert wrong.any()
    for name in track.attacks:
        assert not (track.tried(name) & wrong).any()
    assert not (track.robust() & wrong).any()
    assert np.array_equal(arrays.ledger.worst[wrong], arrays.x[wrong])


def test_flags_are_what_the_stored_images_show(honest, data):
    _, arrays = honest
    engine, ledger = TorchEngine(Quadrants()), arrays.ledger
    again = read(engine.logits(ledger.worst), arrays.y)
    assert np.array_equal(again.robust, ledger.engine.robust())
    assert (distances(ledger.worst, arrays.x, "linf") <= 0.04 + 1e-6).all()
    assert ledger.worst.min() >= 0 and ledger.worst.max() <= 1 and ledger.worst.dtype == np.float32


def test_the_worst_case_is_the_and_over_attacks_and_more_attacks_never_raise_it(honest, data):
    _, arrays = honest
    track = arrays.ledger.engine
    expected = track.clean.robust.copy()
    for name, judged in track.attacks.items():
        expected &= ~track.tried(name) | judged.robust
    assert np.array_equal(track.robust(), expected)
    fewer, _ = go(TorchEngine(Quadrants()), data, source=Quadrants(), policy=SMALL.model_copy(update={"square_queries": 0}))
    assert honest[0].engine.robust_accuracy.estimate <= fewer.engine.robust_accuracy.estimate


def test_forward_calls_are_what_the_engine_received(data):
    engine = TorchEngine(Quadrants())
    result, _ = go(engine, data, policy=SMALL.model_copy(update={"noise_draws": 3}))
    attacks = sum(a.forward_calls for a in result.engine.attacks.values())
    n = len(data)
    probes = n + 2 * n + 4 * n + n  # clean, S1, S2 (full, 1, 7, permuted), S7
    evidence = 3 + n + 2 * n + n + 2 * n  # S3 probes, S16 mirrored and unseen, scale of S18, S18 itself
    assert engine.images == attacks + probes + evidence


def test_eps_zero_leaves_clean_accuracy(data):
    result, arrays = go(TorchEngine(Quadrants()), data, source=Quadrants(), threat=ThreatModel(eps=0))
    assert result.engine.robust_accuracy == result.engine.clean_accuracy
    assert np.array_equal(arrays.ledger.worst, arrays.x) and not statuses(result, "block")


def test_two_runs_are_equal_and_leave_the_nets_alone(data):
    net = Quadrants().train()
    first, a = go(TorchEngine(Quadrants()), data, source=net)
    assert net.training and net.gain.requires_grad and net.gain.grad is None
    second, b = go(TorchEngine(Quadrants()), data, source=net)
    assert plain(first) == plain(second) and np.array_equal(a.ledger.worst, b.ledger.worst)


def plain(result):
    """The result without its times."""
    values = result.model_dump()
    values.pop("seconds")
    for side in ("engine", "source_model"):
        for attack in (values[side] or {"attacks": {}})["attacks"].values():
            attack.pop("seconds")
    return values


def test_a_linear_engine_has_exactly_the_robust_accuracy_its_weights_say(data):
    """Two classes: the margin falls by eps * |w_0 - w_1|_1 and no further, away from the box."""
    net = linear(2, (1, 8, 8))
    pair = images(64, classes=2)
    grey = type(pair)((118 + pair.images.astype(int) // 13).astype(np.uint8), pair.labels, pair.classes, pair.name, pair.split)
    x = torch.from_numpy(grey.floats())
    with torch.no_grad():
        z = net(x).double()
        answers = z.argmax(1)
        widths = (net[1].weight[0] - net[1].weight[1]).abs().sum().double()
        radius = ((z.amax(1) - z.amin(1)) / widths).numpy()
    data = type(pair)(grey.images, answers.numpy(), pair.classes, pair.name, pair.split)
    eps = float(np.median(radius))
    gap = np.abs(radius - eps)
    data = data.take(np.flatnonzero(gap > 0.02 * eps))
    expected = float((radius[gap > 0.02 * eps] > eps).mean())
    result, _ = go(TorchEngine(net, (1, 8, 8), 2), data, source=net, threat=ThreatModel(eps=eps))
    assert result.engine.robust_accuracy.estimate == expected
    assert "apgd-t" not in result.engine.attacks and "attack" in statuses(result, "skipped")


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    data = images(48, classes=classes)
    result, _ = go(TorchEngine(Quadrants(classes), classes=classes), data, source=Quadrants(classes))
    assert result.engine.robust_accuracy.estimate < result.engine.clean_accuracy.estimate
    assert not statuses(result, "block"), result.checks


@pytest.mark.parametrize("size", [1, 7])
def test_any_batch_size_and_all_wrong(size, data):
    flipped = data.take(np.arange(9))
    flipped = type(data)(flipped.images, (flipped.labels + 1) % 4, data.classes, data.name, data.split)
    result, _ = go(TorchEngine(Quadrants()), flipped, source=Quadrants(), audit=AuditConfig(batch_size=size))
    assert result.engine.robust_accuracy.estimate <= result.engine.clean_accuracy.estimate < 0.3


# --- cheating models: the body is undefended (about 0 % robust at this radius) -------------------------------

FLAT = ThreatModel(eps=0.15)
FLOOR = AuditConfig(tolerance=8, min_robust=20, batch_size=32)


def on_grid(x):
    return ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) < 1e-5


class Noisy:
    def __init__(self):
        self.rng = torch.Generator().manual_seed(0)

    def __call__(self, net, x):
        return net(x + 0.25 * torch.randn(x.shape, generator=self.rng))


CHEATS = {
    "noise": (lambda: Noisy(), {"S1", "S2", "S18"}),
    "huge": (lambda: lambda net, x: net(x) * 1e4, set()),
    "labels": (lambda: lambda net, x: torch.nn.functional.one_hot(net(x).argmax(1), 4).float(), {"S4"}),
    "cold softmax": (lambda: lambda net, x: (net(x) * 1e3).softmax(1), {"S4", "S12"}),
    "nan": (lambda: lambda net, x: torch.where(on_grid(x)[:, None], net(x), torch.nan), {"S3"}),
    "train mode": (lambda: lambda net, x: net(x) - net(x).mean(0), {"S2"}),
}


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("parent", [True, False])
def test_cheating_engines_never_pass(cheat, parent, data):
    answer, named = CHEATS[cheat]
    net = Quadrants()
    result, _ = go(TorchEngine(net, answer=answer()), data, source=net if parent else None, threat=FLAT, audit=FLOOR)
    assert result.verdict.status in ("fail", "invalid", "inconclusive"), cheat
    if named:
        fired = statuses(result, "block") & named
        assert fired or (not parent and named == {"S12"}), (cheat, result.checks)
    if parent:
        assert result.engine.robust_accuracy.estimate < 0.2
        assert result.verdict.status in ("fail", "invalid")


def test_an_honest_quantised_engine_fires_no_block(data):
    """Coarse logits, ties and plateaus: the surrogate keeps its strength."""
    engine = TorchEngine(Quadrants(), answer=lambda net, x: (net(x) * 8).round() / 8)
    result, _ = go(engine, data, source=Quadrants())
    assert not statuses(result, "block"), result.checks
    assert abs(result.difference.robust.estimate) < 0.05


class Rounded(Quadrants):
    def forward(self, x):
        return super().forward((x * 7).round() / 7)


class Detached(Quadrants):
    def forward(self, x):
        return super().forward(x).detach()


class Hard(Quadrants):
    def forward(self, x):
        return torch.nn.functional.one_hot(super().forward(x).argmax(1), 4).float()


class Huge(Quadrants):
    def forward(self, x):
        return super().forward(x) * 1e4


@pytest.mark.parametrize(("net", "named"), [(Rounded, "S12"), (Detached, "S12"), (Hard, "S12"), (Huge, "")])
def test_cheating_checkpoints_audited_on_themselves(net, named, data):
    model = net()
    result, _ = go(TorchEngine(model), data, twin=model, threat=FLAT, audit=FLOOR)
    assert result.verdict.status in ("fail", "invalid")
    if named:
        assert named in statuses(result, "block")
    else:
        assert result.engine.robust_accuracy.estimate < 0.1


def test_a_constant_engine_is_not_robust_on_class_zero(data):
    result, _ = go(TorchEngine(Quadrants(), answer=lambda net, x: net(x) * 0), data)
    assert result.engine.clean_accuracy.estimate == result.engine.robust_accuracy.estimate == 0
    assert "S4" in statuses(result, "warn")


def test_another_model_as_source_is_a_parity_error(data):
    swapped = TorchEngine(Quadrants(), answer=lambda net, x: net(x).roll(1, 1))
    with pytest.raises(NumericsError, match="parity"):
        go(swapped, data, source=Quadrants())


def test_without_a_source_it_says_what_could_not_run(data):
    result, _ = go(TorchEngine(Quadrants()), data)
    assert (
        set(result.engine.attacks) == {"noise", "square", "uint8-post"}
        and result.source_model is None
        and result.difference is None
    )
    assert result.verdict.status == "inconclusive"
    skipped = statuses(result, "skipped")
    assert {"S5", "S9", "S10", "S12", "S13", "white-box"} <= skipped


def test_a_replayed_attack_is_judged_on_both_sides(data):
    """An engine that hides its own weakness behind rounding still meets the source's examples."""
    net = trained(Conv(), data)
    engine = TorchEngine(net, answer=lambda n, x: (n(x) * 4).round() / 4)
    result, arrays = go(engine, data, source=net, threat=ThreatModel(eps=0.03))
    source = arrays.ledger.source
    for name in source.attacks:
        assert np.array_equal(source.tried(name), arrays.ledger.engine.tried(name))
    assert result.verdict.status != "pass" or result.difference.robust.high <= 0.08


def test_eps_eight_is_met_with_a_warning(data):
    said = []
    result, _ = go(TorchEngine(Quadrants()), data, threat=ThreatModel(eps=8), progress=said.append)
    assert "eps" in statuses(result, "warn")
    assert any(event.kind == "warning" and "8/255" in event.text for event in said)


def test_images_of_another_shape_or_more_classes_are_refused(data):
    with pytest.raises(ArtifactError, match="shape"):
        go(TorchEngine(Quadrants(), (3, 8, 8)), data)
    with pytest.raises(ArtifactError, match="classes"):
        go(TorchEngine(Quadrants(2), classes=2), data)
