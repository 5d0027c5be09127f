"""Several audits read together: Holm's adjustment, and p values that agree with the verdict they stand for."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from robustkd.auditing.verdict import Counts, Pair, difference, judge
from robustkd.cli.app import run as command
from robustkd.recipe.policy import AuditConfig, bounds_told
from robustkd.recipe.policy import Gates as NoGates
from robustkd.reporting.compare import claim_p, compare
from robustkd.reporting.markdown import table
from robustkd.result import Interval
from robustkd.stats import drop_p, floor_p, holm, wilson
from tests.unit.audit_samples import result, side


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == [] and holm([0.02]) == [0.02]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_shrinks_a_p_value_and_keeps_their_order(values):
    found = holm(values)
    assert all(p <= q <= min(1, len(values) * p + 1e-12) for p, q in zip(values, found, strict=True))
    by_p = sorted(zip(values, found, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(by_p))
    fdr = false_discovery_control(values) if max(values) > 0 else values
    assert all(q >= f - 1e-12 for q, f in zip(found, fdr, strict=True))  # guarding against any error is stricter


def given_counts(b, c, n, config, clean=(0, 0), k=250):
    counts = Counts(n, n // 2, k, clean_pair=Pair(*clean), robust_pair=Pair(b, c))
    found = result("pass", policy={"name": "quick", "bounds": bounds_told(NoGates(), config)})
    engine = side(0.5, 0.5).model_copy(update={"clean_accuracy": _share(n // 2, n), "robust_accuracy": _share(k, n)})
    data = found.dataset.model_copy(update={"n": n})
    verdict = judge(counts, config, [])[1]
    return found.model_copy(
        update={"engine": engine, "dataset": data, "difference": difference(counts), "verdict": verdict, "checks": ()}
    )


def _share(k, n):
    low, high = wilson(k, n)
    return Interval(estimate=k / n, low=low, high=high)


@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 9),
    st.integers(100, 2500),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([None, 5.0, 20.0]),
)
def test_the_p_value_says_what_the_verdict_says(b, c, lost, n, tolerance, floor):
    audit = given_counts(b, c, n, AuditConfig(tolerance=tolerance, min_robust=floor), clean=(lost, 0), k=n // 8)
    p = claim_p(audit)
    assert abs(p - 0.05) < 1e-6 or (p <= 0.05) == (audit.verdict.status == "pass")


def test_the_p_value_at_the_corner_is_the_exact_one():
    assert drop_p(0, 0, 300, 0.01) == pytest.approx(0.99**300)
    assert floor_p(500, 1000, 0.5) == pytest.approx(0.5) and floor_p(5, 10, 0.0) == 0.0 and floor_p(5, 10, 1.0) == 1.0
    with pytest.raises(ValueError, match="margin"):
        drop_p(1, 1, 10, 0.0)


def test_three_narrow_passes_do_not_all_hold_together(tmp_path, capsys):
    narrow = given_counts(0, 0, 310, AuditConfig())
    sure = given_counts(0, 0, 3000, AuditConfig())
    assert narrow.verdict.status == sure.verdict.status == "pass"
    assert compare([narrow])[0]["pass_jointly"]
    rows = compare([narrow, sure, narrow])
    assert [row["pass_jointly"] for row in rows] == [False, True, False]
    assert rows[0]["p"] < 0.05 < rows[0]["p_holm"]
    assert "not shown to pass" in table([narrow, sure, narrow]) and "also holds" in table([sure, sure])
    assert "Holm" not in table([narrow])
    for name, audit in (("a", narrow), ("b", narrow)):
        (tmp_path / f"{name}.json").write_text(audit.model_dump_json(by_alias=True))
    assert command(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"]) == 0
    assert [row["pass_jointly"] for row in json.loads(capsys.readouterr().out)["results"]] == [False, False]


def test_no_claim_without_a_bound_or_with_a_block():
    assert claim_p(result("inconclusive", source=False)) is None
    audit = given_counts(0, 0, 400, AuditConfig())
    assert claim_p(audit) is not None
    assert claim_p(audit.model_copy(update={"verdict": audit.verdict.model_copy(update={"status": "invalid"})})) is None
    assert compare([result("pass")])[0]["p"] is None  # of a version that did not keep the clean counts
