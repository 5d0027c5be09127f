"""The ladder of radii: monotone for every image, whatever the network; each radius is vouched for by an image."""

import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkd import reporting
from robustkd.attacks.pgd import PGD
from robustkd.auditing import run
from robustkd.auditing.effort import RUNGS
from robustkd.auditing.ladder import NAME
from robustkd.auditing.ledger import distances
from robustkd.auditing.sides import read
from robustkd.errors import Interrupted
from robustkd.recipe.policy import AuditConfig, Policy, read_policy
from robustkd.reporting.inputs import ReportInput
from robustkd.result import AuditResult
from robustkd.threat import SLACK, ThreatModel
from tests.audit_cheats import CHEATS, Cheating, Known
from tests.audit_nets import Conv, Quadrants, TorchEngine, images, trained
from tests.unit.audit_samples import result
from tests.unit.test_audit_resume import Dying, plain
from tests.unit.test_audit_resume import go as keep
from tests.unit.test_audit_run import go

POLICY = Policy(
    name="ladder", noise_draws=2, pgd_steps=4, apgd_steps=0, targets=0, square_queries=0, uint8="none", ladder_images=24,
    scale_images=0, memory_images=0, fresh_process=False,
)  # fmt: skip
DATA = images(32)


class Bumpy(Conv):
    """Steps in the input hide the gradient, and the answer changes back and forth along it."""

    def forward(self, x):
        return super().forward(x + 0.08 * torch.sin(300 * x) + ((12 * x).round() / 12 - x).detach())


def nets():
    """Honest and bumpy nets of random weights, and cheats that hide or bend the gradient."""
    honest = st.builds(lambda seed, steps: trained(Conv(seed=seed), DATA, steps), st.integers(0, 99), st.sampled_from([5, 40]))
    bumpy = st.builds(lambda seed: trained(Bumpy(seed=seed), DATA, 30), st.integers(0, 99))
    masked = st.sampled_from(["sinusoid", "coarse input", "detached", "low bits ignored", "fixed noise"])
    return honest | bumpy | masked.map(lambda name: Cheating(CHEATS[name](Known(DATA.floats(), DATA.labels))))


@settings(max_examples=8)
@given(nets(), st.sampled_from([ThreatModel(eps=0.03), ThreatModel(norm="l2", eps=0.25)]))
def test_a_fallen_image_never_rises_again(net, threat):
    found, arrays = go(TorchEngine(net), DATA, source=net, threat=threat, policy=POLICY, audit=AuditConfig(tolerance=99))
    curve, independent = found.radius_curve, found.eps_curve
    if curve is None:
        assert independent is None
        return
    rows = np.array(curve.images)
    assert curve.eps == independent.eps == (0, *(part * threat.eps for part in RUNGS)) and curve.survive[0] == 1
    assert list(curve.survive) == sorted(curve.survive, reverse=True)
    # the weakest of the independent runs at any smaller radius bounds it, and so does the audit at eps
    assert all(warm <= min(independent.survive[: k + 1]) for k, warm in enumerate(curve.survive))
    at_eps = curve.survive[curve.eps.index(threat.eps)]
    assert at_eps <= arrays.ledger.engine.robust()[rows].mean()
    # every radius has an image that breaks the engine, and lies in this ball and in all larger ones
    vouching = arrays.store.get(NAME)["x_adv"]
    with torch.no_grad():
        broken = ~read(net(torch.from_numpy(vouching)).numpy(), DATA.labels[rows]).robust
    away = distances(vouching, DATA.floats()[rows], threat.norm)
    for k, eps in enumerate(curve.eps[1:], 1):
        fell = np.array([radius is not None and radius <= eps for radius in curve.radius])
        assert curve.survive[k] == pytest.approx(1 - fell.mean())
        assert broken[fell].all() and (away[fell] <= eps + SLACK).all()
    assert vouching.min() >= 0 and vouching.max() <= 1


def test_going_on_from_the_rung_above_finds_what_independent_runs_miss():
    net = trained(Bumpy(), DATA, 30)
    curves = [go(TorchEngine(net), DATA, source=net, policy=POLICY, threat=ThreatModel(eps=e))[0] for e in (0.01, 0.02, 0.04)]
    gained = [sum(c.eps_curve.survive) - sum(c.radius_curve.survive) for c in curves]
    assert min(gained) >= 0 and max(gained) > 0.1, gained


def test_batch_size_and_another_run_change_nothing():
    """Float64 inside, as float32 sums depend on the batch by themselves."""

    class Exact(Quadrants):
        def forward(self, x):
            return super().forward(x.double()).float()

    # other batches are no matter of the ladder where S6's own starts are drawn for a batch
    sizes = (64, 64, 7, 1) if PGD.per_image else (64, 64)
    found = [
        go(TorchEngine(Exact()), DATA, source=Exact(), policy=POLICY, audit=AuditConfig(tolerance=99, batch_size=size))[0]
        for size in sizes
    ]
    assert all(r.radius_curve == found[0].radius_curve and r.eps_curve == found[0].eps_curve for r in found)
    assert 0 < found[0].radius_curve.survive[3] < 1


def test_killed_on_the_ladder_and_resumed(tmp_path):
    """Byte-equal, wherever on the ladder it was killed, and what was finished is not computed again."""
    counting = Dying(Quadrants(), 10**6)
    whole = keep(None, counting, policy=POLICY)[0]
    calls = 10**6 - counting.left
    for before in (1, 2, 30):
        folder = tmp_path / f"audit-{before}"
        with pytest.raises(Interrupted) as stopped:
            keep(folder, Dying(Quadrants(), calls - before), policy=POLICY)
        assert stopped.value.exit_code == Interrupted(signal.SIGTERM).exit_code
        again = keep(folder, resume=True, policy=POLICY)[0]
        assert plain(again) == plain(whole) and again.radius_curve == whole.radius_curve is not None


def test_left_out_with_s6_and_read_back():
    none, _ = go(TorchEngine(Quadrants()), DATA, source=Quadrants(), policy=POLICY.model_copy(update={"ladder_images": 0}))
    assert none.radius_curve is None and none.eps_curve is None
    some, _ = go(TorchEngine(Quadrants()), DATA, source=Quadrants(), policy=POLICY)
    assert AuditResult.model_validate_json(some.model_dump_json(by_alias=True)).radius_curve == some.radius_curve
    page = reporting.render([ReportInput(some)])
    assert "warm-started" in page and "independent runs" in page and page.count("<figure") == 1
    assert reporting.render([ReportInput(result())]).count("warm-started") == 0  # results of before have none


def test_it_costs_quick_little(monkeypatch):
    """In images sent to the engine; measured between 1 and 4 % on the networks here."""
    engine, sent, ladder = TorchEngine(Quadrants()), [], run.radius_curve

    def watched(job, policy):
        before = engine.images
        curve = ladder(job, policy)
        sent.append(engine.images - before)
        return curve

    monkeypatch.setattr(run, "radius_curve", watched)
    quick = read_policy("quick").model_copy(update={"fresh_process": False})
    go(engine, images(64), source=Quadrants(), policy=quick)
    assert 0 < sent[0] < 0.1 * (engine.images - sent[0]), (sent, engine.images)
