"""Gates of a policy file: drops of their own, floors, latency; what is set beside them overrides them."""

import numpy as np
import pytest

from robustkd.auditing.asking import _config
from robustkd.auditing.latency import judged, latency_bounds
from robustkd.auditing.verdict import Counts, Pair, judge
from robustkd.cli.app import run as command
from robustkd.errors import ConfigError
from robustkd.recipe.policy import AuditConfig, Gates, bounds_told, gates_of, read_policy
from tests.audit_nets import Quadrants, TorchEngine, images

FREE = AuditConfig()


def status(table, gates, measured=()):
    return judge(table, gates, [], measured)[1].status


def test_what_is_set_beside_a_policy_overrides_its_gates():
    gates = Gates(clean_drop=3, robust_drop=2, min_robust=20)
    assert gates_of(Gates(), FREE).clean_drop == gates_of(Gates(), FREE).robust_drop == 1.0
    assert gates_of(gates, FREE) == gates
    tight = gates_of(gates, AuditConfig(tolerance=0.5, min_robust=30))
    assert (tight.clean_drop, tight.robust_drop, tight.min_robust) == (0.5, 0.5, 30)
    assert gates_of(gates, AuditConfig(tolerance=1.0)).robust_drop == 1.0


def test_a_recipe_that_only_holds_defaults_sets_nothing():
    held = {"audit": AuditConfig(n=24).model_dump()}
    gates = Gates(robust_drop=5)
    assert gates_of(gates, _config(held)).robust_drop == 5
    assert _config(held).n == 24
    stricter = {"audit": AuditConfig(tolerance=2, min_clean=40).model_dump()}
    assert gates_of(gates, _config(stricter)).robust_drop == 2
    asked = _config(stricter, policy="full")
    assert gates_of(gates, asked).robust_drop == 5 and asked.min_clean is None
    assert gates_of(gates, _config(stricter, policy="full", tolerance=3.0)).robust_drop == 3


def test_each_drop_has_its_gate():
    table = Counts(1000, 500, 250, clean_pair=Pair(33, 5), robust_pair=Pair(9, 3))
    assert status(table, Gates(clean_drop=5, robust_drop=2)) == "pass"
    assert status(table, Gates(clean_drop=1, robust_drop=2)) == "fail"
    assert status(table, Gates(clean_drop=5, robust_drop=1)) == "inconclusive"
    assert status(table, Gates(clean_drop=5, robust_drop=2, min_robust=40)) == "fail"


def test_latency_is_held_against_the_interval_of_its_percentile():
    times = list(np.linspace(1, 2, 200))
    for bound, outcome in ((3.0, "ok"), (1.95, "open"), (1.2, "fail")):
        assert judged(times, bound, 1).outcome == outcome
    found = judged(times[::-1], 3.0, 4).check
    assert found.low < found.observed < found.high and found.observed == pytest.approx(1.95, abs=0.01)
    assert "batch of 4" in found.message
    table = Counts(1000, 500, 250, clean_pair=Pair(0, 0), robust_pair=Pair(0, 0))
    assert status(table, Gates(clean_drop=1, robust_drop=1), [judged(times, 3.0, 1)]) == "pass"
    assert status(table, Gates(clean_drop=1, robust_drop=1), [judged(times, 1.95, 1)]) == "inconclusive"
    assert status(table, Gates(clean_drop=1, robust_drop=1), [judged(times, 1.2, 1)]) == "fail"
    assert status(Counts(10, 5, 5), Gates(), [judged(times, 3.0, 1)]) == "inconclusive"  # speed alone is no robustness


def test_latency_is_measured_on_the_engine_at_its_batch():
    engine, x = TorchEngine(Quadrants()), images(5).floats()
    assert latency_bounds(engine, x, Gates()) == []
    (found,) = latency_bounds(engine, x, Gates(latency_p95_ms=1e9, latency_batch=7))
    assert found.outcome == "ok" and found.check.observed > 0 and engine.images == 220 * 7


def test_the_result_holds_the_gates_in_force():
    told = bounds_told(Gates(clean_drop=3), AuditConfig(min_robust=10))
    assert told["gates"] == {"clean_drop": 3, "robust_drop": 1.0, "min_robust": 10, "latency_batch": 1}


def test_a_policy_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: quick\ngates:\n  robust_drop: 2\n  min_robust: 30\n  latency_p95_ms: 5\n")
    assert read_policy(str(file)).gates == Gates(robust_drop=2, min_robust=30, latency_p95_ms=5)
    file.write_text("extends: quick\ngates:\n  robust_dorp: 2\n")
    with pytest.raises(ConfigError) as caught:
        read_policy(str(file))
    assert "robust_dorp" in caught.value.what and "line 3" in caught.value.where and "robust_drop" in caught.value.fix


def test_a_shipped_policy_can_be_copied_and_edited(tmp_path, capsys):
    assert command(["copy", "policy", "full", str(tmp_path / "mine.yaml")]) == 0
    assert read_policy(str(tmp_path / "mine.yaml")).model_copy(update={"name": "full"}) == read_policy("full")
