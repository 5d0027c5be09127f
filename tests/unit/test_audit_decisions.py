"""Attacks on decisions alone in an audit: which engines meet them, on how many images, and what is told of the others."""

import numpy as np
import pytest

from robustkd.auditing import evidence
from robustkd.auditing.kit import read_kit, save_kit
from robustkd.auditing.merge import complete, finished, shard_folder, write_shard
from robustkd.auditing.plan import plan, reads_labels
from robustkd.auditing.run import Order, SourceModel, carry_out, carry_out_shard, run_audit
from robustkd.auditing.shards import Shard
from robustkd.errors import Interrupted
from robustkd.recipe.policy import AuditConfig, Policy, read_policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_checks import N, broken, ledger_with
from tests.unit.test_audit_resume import Dying, plain
from tests.unit.test_audit_run import FACTS
from tests.unit.test_rays import labels_of

LIMIT = 12
#: only what reads labels, so that nothing else breaks an image before
POLICY = Policy(
    name="decisions", noise_draws=1, pgd_steps=0, apgd_steps=0, targets=0, square_queries=0, rays_queries=60, rays_always=True,
    hopskipjump_queries=150, hopskipjump_always=True, decision_images=LIMIT, ladder_images=0, scale_images=0, memory_images=0,
)  # fmt: skip


def order(folder=None, engine=None, **changes):
    values = {
        "artifact": FACTS,
        "images": images(40),
        "threat": ThreatModel(eps=0.04),
        "policy": POLICY,
        "audit": AuditConfig(tolerance=8, batch_size=8),
        "source": SourceModel(Quadrants(gain=59.0), "s", "sha256:1"),
        "folder": folder,
        **changes,
    }
    return Order(engine or TorchEngine(Quadrants()), **values)


@pytest.fixture(scope="module")
def whole():
    return carry_out(order())


def decisions(policy, **facts):
    return [
        (s.name, s.images) for s in plan(policy, twin=True, source=False, **facts) if s.attack and s.attack.needs == "labels"
    ]


def test_which_engines_meet_them():
    quick, standard, full = (read_policy(name) for name in ("quick", "standard", "full"))
    for norm in ("linf", "l2"):
        assert not decisions(quick, norm=norm) and not reads_labels(quick, norm)
        assert decisions(standard, norm=norm) == [("rays", 100)] and reads_labels(standard, norm)
        assert decisions(full, norm=norm) == [("rays", 0), ("hopskipjump", 0)] and reads_labels(full, norm)
    assert decisions(standard, kind="labels") == [("rays", 0)]
    assert decisions(standard, kind="labels", norm="l2") == [("rays", 0), ("hopskipjump", 0)]
    only_rays = Policy(rays_queries=10)
    assert reads_labels(only_rays, "linf") and not reads_labels(only_rays, "l2") and not decisions(only_rays)


def test_they_look_at_the_first_images_and_the_others_stand(whole):
    result, arrays = whole
    track = arrays.ledger.engine
    first = np.flatnonzero(track.clean.robust)[:LIMIT]
    for name in ("rays", "hopskipjump"):
        told, tried = result.engine.attacks[name], np.flatnonzero(track.tried(name))
        assert set(tried) <= set(first) and told.images == len(tried) > 0
        assert f"first {LIMIT} images" in told.note and told.broken == int(track.broken([name]).sum())
    assert result.engine.attacks["rays"].broken > 0
    before, after = result.engine.attacks["noise"], result.engine.attacks["rays"]
    assert after.robust_accuracy == before.robust_accuracy - after.broken / len(arrays.x), "of all images, not of those tried"
    assert not result.engine.attacks["noise"].note


def test_a_limit_that_cuts_nothing_is_none():
    limits = (0, 40)
    every, enough = (carry_out(order(policy=POLICY.model_copy(update={"decision_images": n})))[0] for n in limits)
    assert plain(every.engine.model_dump()) == plain(enough.engine.model_dump())
    assert not every.engine.attacks["rays"].note


def test_shards_are_the_whole(tmp_path, whole):
    """The limit falls within the second of five chunks: it counts by position in the audit, not in a shard."""
    folder = tmp_path / "audit"
    for part in (Shard(3, 3), Shard(1, 3), Shard(2, 3)):
        home = shard_folder(folder, part)
        write_shard(carry_out_shard(order(home), part), folder, part, None)
    result, arrays = carry_out(order(folder, resume=True, shards=complete(finished([folder]))))
    assert plain(result) == plain(whole[0])
    assert np.array_equal(arrays.ledger.worst, whole[1].ledger.worst)


@pytest.mark.parametrize("calls", [60, 150, 200])
def test_resumed_is_uninterrupted(tmp_path, whole, calls):
    folder = tmp_path / "audit"
    with pytest.raises(Interrupted):
        carry_out(order(folder, Dying(Quadrants(), calls)))
    result, arrays = carry_out(order(folder, resume=True))
    assert plain(result) == plain(whole[0])
    assert np.array_equal(arrays.ledger.worst, whole[1].ledger.worst)


def test_a_kit_holds_the_images_that_were_searched(tmp_path, whole):
    result, arrays = whole
    save_kit(tmp_path / "kit.npz", result, arrays)
    held = {pool.made.name: pool for pool in read_kit(tmp_path / "kit.npz").pools}
    for name in ("rays", "hopskipjump"):
        assert np.array_equal(held[name].index, np.flatnonzero(arrays.ledger.engine.tried(name)))


@pytest.mark.parametrize(("norm", "eps", "name"), [("linf", 0.12, "rays"), ("l2", 0.7, "hopskipjump")])
def test_labels_alone_are_met_with_every_image(norm, eps, name):
    """Masked: no gradient, no score. The undefended net falls all the same, in both norms, and S4 does not block."""
    engine = TorchEngine(Quadrants(), answer=lambda net, x: labels_of(net)(x))
    policy = POLICY.model_copy(update={"rays_always": False, "hopskipjump_always": False, "hopskipjump_queries": 1500})
    policy = policy.model_copy(update={"rays_queries": 200, "decision_images": 3, "uint8": "none"})
    threat, audit = ThreatModel(norm=norm, eps=eps), AuditConfig(min_robust=30)
    result, _ = run_audit(engine, artifact=FACTS, images=images(24), threat=threat, policy=policy, audit=audit)
    found = result.engine.attacks[name]
    assert found.images > LIMIT and not found.note
    assert result.engine.robust_accuracy.estimate < 0.25 < result.engine.attacks["noise"].robust_accuracy
    checks = {check.name.split()[0]: check.status for check in result.checks}
    assert checks["S4"] == "warn" and result.verdict.status != "pass"
    if norm == "l2":
        without, _ = run_audit(
            engine, artifact=FACTS, images=images(24), threat=threat, audit=audit,
            policy=policy.model_copy(update={"hopskipjump_queries": 0}),
        )  # fmt: skip
        assert next(c.status for c in without.checks if c.name.startswith("S4")) == "block"


@pytest.mark.parametrize(("count", "status"), [(0, "ok"), (1, "warn"), (2, "block")])
def test_s9_counts_a_limited_attack_by_the_images_it_looked_at(count, status):
    """2 of 20 is surely over 0.2 %; 2 of 200 would not be, but the other 180 were never shown to it."""
    policy = Policy(apgd_steps=0, rays_queries=1, rays_always=True, decision_images=20, square_queries=1)
    steps = plan(policy, twin=True, source=False)
    margins = broken(*range(count))
    margins[20:] = np.nan
    found = {"noise": np.ones(N), "pgd": broken(*range(50, 100)), "square": np.ones(N), "rays": margins}
    check = evidence.witnesses(ledger_with(found), steps)[0]
    assert check.status == status
    assert check.message.startswith(f"{count} of {20 if count else N} images")
    squared = found | {"rays": np.where(np.isnan(margins), margins, 1.0), "square": broken(*range(150, 150 + 6))}
    assert evidence.witnesses(ledger_with(squared), steps)[0].message.startswith(f"6 of {N}")
