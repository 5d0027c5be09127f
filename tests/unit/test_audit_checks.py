"""Every sanity check can fire, and says what it saw."""

import numpy as np
import pytest
import torch

from robustkd.auditing import evidence, probes, recheck
from robustkd.auditing.ledger import Ledger, distances
from robustkd.auditing.plan import plan, seed_of
from robustkd.auditing.sides import NO_NUMBER, Judged, Side, read
from robustkd.auditing.twin import Surrogate, Values, tame
from robustkd.recipe.policy import Policy, read_policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, TorchEngine, images

N = 200
THREAT = ThreatModel(eps=0.1)


def judged(margins, predictions=None):
    margins = np.asarray(margins, float)
    return Judged(np.zeros(len(margins), np.int64) if predictions is None else np.asarray(predictions), margins)


def ledger_with(level_margins):
    """A ledger of N images right when clean, and for each attack the margins it left (NaN: not tried)."""
    x = np.full((N, 1, 2, 2), 0.5, np.float32)
    ledger = Ledger(x, THREAT, judged(np.ones(N)), None)
    for name, margins in level_margins.items():
        ledger.begin(name)
        index = np.flatnonzero(~np.isnan(margins))
        ledger.add(name, index, x[index], judged(margins[index]), None)
    return ledger


def broken(*which):
    margins = np.ones(N)
    margins[list(which)] = -1
    return margins


STEPS = plan(Policy(noise_draws=1, pgd_steps=1, apgd_steps=0, square_queries=1), twin=True, source=False)
REPLAY = plan(Policy(noise_draws=1, pgd_steps=1, apgd_steps=1, targets=0, square_queries=1), twin=True, source=True)


@pytest.mark.parametrize(
    ("attack", "position", "count", "status"),
    [
        ("square", 0, 0, "ok"),
        ("square", 0, 1, "warn"),
        ("square", 0, 6, "block"),
        ("replay:apgd-ce", 1, 2, "ok"),
        ("replay:apgd-ce", 1, 3, "warn"),
        ("replay:apgd-ce", 1, 9, "block"),
        ("noise", 2, 2, "ok"),
        ("noise", 2, 9, "block"),
    ],
)
def test_s9_s10_s11_count_what_gradients_could_not_break(attack, position, count, status):
    found = {"noise": np.ones(N), "pgd": broken(*range(50, 100)), "apgd-ce": np.ones(N)}
    found |= {"replay:apgd-ce": np.ones(N), "square": np.ones(N)}
    found[attack] = broken(*range(count), *range(50, 60))  # those the surrogate broke as well do not count
    check = evidence.witnesses(ledger_with(found), REPLAY)[position]
    assert check.status == status and check.message.startswith(f"{count} of {N}")


def test_without_gradients_there_is_nothing_to_compare():
    steps = plan(Policy(), twin=False, source=False)
    assert [s.name for s in steps] == ["noise", "square", "uint8-post"]
    checks = evidence.witnesses(ledger_with({"noise": np.ones(N), "square": np.ones(N)}), steps)
    assert {c.status for c in checks} == {"skipped"}


class Backwards(Quadrants):
    """A twin whose gradient points away."""

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    ("twin", "zero", "ascent"), [(Quadrants, "ok", "ok"), (Backwards, "ok", "block"), (None, "block", "block")]
)
def test_s12_s13(twin, zero, ascent):
    data = images(64)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    engine = TorchEngine(Quadrants())
    right = Quadrants()(x).argmax(1) == y
    model = Surrogate(Values(engine), twin() if twin else torch.nn.Sequential(torch.nn.Flatten(), Zero()))
    checks = evidence.gradients(model, Side(engine.logits, 32), x[right], y[right], THREAT, logs=False)
    assert [c.status for c in checks] == [zero, ascent]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize(("twin", "ascent"), [(Quadrants, "ok"), (Backwards, "block")])
def test_s13_sees_through_the_scale_of_the_logits(factor, twin, ascent):
    """Cross entropy is exactly zero above a margin of 37: an honest engine of large logits is not to blame for that."""
    data = images(64)
    x, y = torch.from_numpy(data.floats()), torch.from_numpy(data.labels)
    engine = TorchEngine(Quadrants(), answer=lambda net, z: factor * net(z))
    right = Quadrants()(x).argmax(1) == y
    model = tame(Values(engine), twin(), x)
    found = evidence.gradients(model, Side(engine.logits, 32), x[right], y[right], THREAT, logs=False)
    assert [c.status for c in found] == ["ok", ascent]


class Zero(torch.nn.Module):
    def forward(self, x):
        return 0 * x[:, :4]


def test_s12_s13_are_skipped_at_eps_zero_and_without_images():
    engine = TorchEngine(Quadrants())
    x, y = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)
    side = Side(engine.logits, 8)
    assert {c.status for c in evidence.gradients(Quadrants(), side, x, y, THREAT, logs=False)} == {"skipped"}
    assert {c.status for c in evidence.gradients(Quadrants(), side, x, y, ThreatModel(eps=0), logs=False)} == {"skipped"}


@pytest.mark.parametrize("bad", [0.5 + 0.11, np.nan, -0.1])
def test_s15_sees_what_left_the_ball_or_the_range(bad):
    ledger = ledger_with({"pgd": np.full(N, np.nan)})
    ledger.add("pgd", np.array([3]), np.full((1, 1, 2, 2), 0.6, np.float32), judged([1.0]), None)
    assert recheck.inside(ledger, THREAT).status == "ok"
    ledger.add("pgd", np.array([4]), np.full((1, 1, 2, 2), bad, np.float32), judged([1.0]), None)
    check = recheck.inside(ledger, THREAT)
    assert check.status == "block" and check.message.startswith("1 adversarial")


def test_s18_sees_an_engine_that_changes_its_mind():
    data = images(32)
    x, y = data.floats(), data.labels
    engine = TorchEngine(Quadrants())
    ledger = Ledger(x, THREAT, read(engine.logits(x), y), None)
    assert recheck.rejudged(Side(engine.logits, 16), ledger, x, y, 16).status == "ok"
    moody = TorchEngine(Quadrants(), answer=lambda net, z: net(z).roll(1, 1))
    assert recheck.rejudged(Side(moody.logits, 16), ledger, x, y, 16).status == "block"


def test_s18_takes_rounding_at_the_boundary_for_a_warning():
    data = images(32)
    x, y = data.floats(), data.labels
    labels = torch.nn.functional.one_hot(torch.from_numpy(y), 4).float()

    def answer(net, z):  # wide logits on the first images, a hair above the boundary on the last two
        rows = [int(np.flatnonzero((x == image.numpy()).all((1, 2, 3)))[0]) for image in z]
        return torch.stack([labels[r] * (1e-5 if r >= 30 else 10.0) for r in rows])

    engine = Side(TorchEngine(Quadrants(), answer=answer).logits, 16)
    clean = engine.judge(x, y)
    before = Judged(clean.prediction, np.where(np.arange(32) >= 30, -1e-5, clean.margin))
    assert recheck.rejudged(engine, Ledger(x, THREAT, before, None), x, y, 16).status == "warn"


def test_s7_sees_an_engine_that_answers_by_position():
    data = images(32)
    by_position = Side(lambda x: np.eye(4, dtype=np.float32)[np.arange(len(x)) % 4], 32)
    assert probes.grey(by_position, data.floats(), data.labels).status == "block"
    honest = Side(TorchEngine(Quadrants()).logits, 32)
    assert probes.grey(honest, data.floats(), data.labels).status == "ok"


def test_s5_blocks_a_drop_beyond_tolerance_and_warns_of_disagreement():
    right, wrong = np.ones(N), broken(*range(40))
    classes = np.zeros(N, np.int64)
    other = classes.copy()
    other[:40] = 1
    check = probes.agreement(judged(wrong, other), judged(right, classes), 0.01, paired=True)
    assert check.status == "block" and "drops by 20.0 points" in check.message
    assert probes.agreement(judged(wrong, other), judged(right, classes), 0.01, paired=False).status == "warn"
    assert probes.agreement(judged(right, classes), judged(right, classes), 0.01, paired=True).status == "ok"


KINDS = {
    "logits": lambda z: z,
    "probabilities": lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True),
    "labels": lambda z: np.eye(4)[z.argmax(1)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_s4_tells_the_kind_of_output(kind):
    z = KINDS[kind](np.random.default_rng(0).standard_normal((50, 4))).astype(np.float32)
    assert probes.output_kind(z) == kind
    check = probes.output(z, read(z, np.zeros(50, np.int64)), kind)
    assert check.status == {"logits": "ok", "probabilities": "warn", "labels": "block"}[kind]


def test_ties_and_non_numbers_are_never_robust():
    z = np.array([[1, 1, 0], [np.nan, 2, 1], [3, np.inf, 0], [2, 1, 0]], np.float32)
    found = read(z, np.zeros(4, np.int64))
    assert found.robust.tolist() == [False, False, False, True]
    assert found.prediction.tolist() == [0, NO_NUMBER, NO_NUMBER, 0]


def test_share_blocks_beyond_doubt_only():
    assert probes.share("x", 0, 100, 0.01, "").status == "ok"
    assert probes.share("x", 2, 100, 0.01, "").status == "warn"
    assert probes.share("x", 20, 100, 0.01, "").status == "block"
    assert probes.share("x", 79, 100, 0.8, "", least=True).status == "warn"
    assert probes.share("x", 0, 100, 0.8, "", least=True).status == "block"
    assert probes.share("x", 0, 0, 0.8, "").status == "skipped"


def test_policies_say_what_they_are():
    quick, standard, full = (read_policy(name) for name in ("quick", "standard", "full"))
    assert (standard.apgd_steps, standard.targets, standard.fab, standard.square_queries) == (100, 9, True, 5000)
    assert quick.apgd_steps < standard.apgd_steps < full.apgd_steps and full.restarts > 1
    assert min(standard.ladder_images, standard.effort_images, standard.scale_images, standard.memory_images) == 64
    last = ["square", "rays", "uint8-post", "apgd-grid"]
    names = [step.name for step in plan(standard, twin=True, source=True)]
    assert names == ["noise", "pgd", "apgd-ce", "apgd-t", "replay:apgd-ce", "replay:apgd-t", "replay:fab-t", *last]
    alone = [step.name for step in plan(standard, twin=True, source=False)]
    assert alone == ["noise", "pgd", "apgd-ce", "apgd-t", "fab-t", *last]


def test_seeds_differ_by_attack_and_chunk():
    seeds = {seed_of(s, name, c) for s in (0, 1) for name in ("pgd", "square") for c in range(3)}
    assert len(seeds) == 12 and all(0 <= s < 2**32 for s in seeds)


def test_distances_in_float64():
    x = np.zeros((2, 1, 2, 2), np.float32)
    moved = x.copy()
    moved[1, 0, 0] = (0.3, -0.4)
    assert distances(moved, x, "linf").tolist() == pytest.approx([0, 0.4])
    assert distances(moved, x, "l2").tolist() == pytest.approx([0, 0.5])
