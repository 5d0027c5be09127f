"""The verdict rule: drop and floors against intervals, blocks, and the n that would decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkd.auditing.verdict import Counts, Pair, difference, judge
from robustkd.recipe.policy import AuditConfig
from robustkd.result import EXIT, Check
from robustkd.stats import tango

FREE = AuditConfig()
BLOCK = Check(name="S1 deterministic", status="block", message="random")
OUTSIDE = Check(name="S15 in ball and range", status="block", message="outside")


def counts(b, c, n, *, clean=(0, 0), **more):
    return Counts(n, n // 2, n // 4, clean_pair=Pair(*clean), robust_pair=Pair(b, c), **more)


def status(*args, **kw):
    return judge(*args, **kw)[1].status


def test_the_larger_run_of_the_note():
    """n = 1000, b = 7, c = 0: inconclusive at 1 point, pass at 2; about 4,800 images would decide."""
    table = counts(7, 0, 1000, clean=(8, 6))
    found = difference(table)
    assert found.robust.estimate == pytest.approx(0.007)
    assert (found.robust.low, found.robust.high) == (pytest.approx(0.0038, abs=1e-4), pytest.approx(0.0129, abs=1e-4))
    assert found.mcnemar_p == pytest.approx(0.016, abs=1e-3) and (found.b, found.c) == (7, 0)
    checks, verdict = judge(table, FREE, [])
    assert verdict.status == "inconclusive"
    wanted = int(verdict.reasons[0].split("about ")[1].split()[0])
    assert 4000 < wanted < 6500 and "this audit has 1000" in verdict.reasons[0]
    assert status(table, AuditConfig(tolerance=2), []) == "pass"
    assert [c.name for c in checks] == ["bound: clean drop", "bound: robust drop"]


@pytest.mark.parametrize(("b", "c", "n", "tolerance"), [(1, 0, 48, 8), (3, 2, 1000, 0.4), (12, 3, 400, 1), (0, 0, 200, 1)])
def test_the_n_asked_for_decides_at_the_same_shares(b, c, n, tolerance):
    _, verdict = judge(counts(b, c, n), AuditConfig(tolerance=tolerance), [])
    assert verdict.status == "inconclusive"
    wanted = int(verdict.reasons[-1].split("about ")[1].split()[0])
    assert wanted > n
    table = Counts(wanted, 0, 0, clean_pair=Pair(0, 0), robust_pair=Pair(round(b * wanted / n), round(c * wanted / n)))
    assert judge(table, AuditConfig(tolerance=tolerance), [])[1].status in ("pass", "fail")


def test_both_drops_must_stay_within_tolerance():
    assert status(counts(0, 0, 300), FREE, []) == "pass"
    assert status(counts(0, 0, 200), FREE, []) == "inconclusive"
    assert status(counts(33, 5, 1000), FREE, []) == "fail"
    assert status(counts(0, 0, 1000, clean=(33, 5)), FREE, []) == "fail"


def test_floors():
    table = Counts(1000, 500, 251)
    assert status(table, AuditConfig(min_robust=22), []) == "pass"
    assert status(table, AuditConfig(min_robust=24), []) == "inconclusive"
    assert status(table, AuditConfig(min_robust=30), []) == "fail"
    assert status(table, AuditConfig(min_robust=22, min_clean=60), []) == "fail"
    assert status(table, AuditConfig(min_clean=45), []) == "pass"
    _, verdict = judge(table, AuditConfig(min_robust=24), [])
    assert "would decide" in verdict.reasons[0]


def test_black_box_alone_refutes_a_floor_but_does_not_show_it():
    blind = Counts(1000, 500, 251, white_box=False)
    assert status(blind, AuditConfig(min_robust=22), []) == "inconclusive"
    assert "give a source" in judge(blind, AuditConfig(min_robust=22), [])[1].reasons[0]
    assert status(blind, AuditConfig(min_robust=30), []) == "fail"
    assert status(blind, AuditConfig(min_clean=45), []) == "pass"


def test_nothing_to_hold_it_against():
    _, verdict = judge(Counts(1000, 500, 251), FREE, [])
    assert verdict.status == "inconclusive" and "nothing to hold" in verdict.reasons[0]


def test_a_block_overrides_pass_but_not_a_proven_fail():
    _, verdict = judge(counts(0, 0, 1000), FREE, [BLOCK])
    assert verdict.status == "invalid" and "S1 deterministic" in verdict.reasons[0]
    _, verdict = judge(counts(33, 5, 1000), FREE, [BLOCK])
    assert verdict.status == "fail" and any("S1" in reason for reason in verdict.reasons)
    assert status(counts(33, 5, 1000), FREE, [OUTSIDE]) == "invalid"
    assert status(Counts(10, 5, 5), FREE, [BLOCK]) == "invalid"


def test_every_verdict_has_its_exit_code():
    assert EXIT == {"pass": 0, "fail": 10, "inconclusive": 11, "invalid": 12}


@given(st.integers(0, 40), st.integers(0, 40), st.integers(100, 3000), st.floats(0.1, 5), st.floats(0, 5))
def test_loosening_a_bound_never_worsens_a_verdict(b, c, n, tolerance, more):
    rank = {"fail": 0, "inconclusive": 1, "pass": 2}
    table = counts(b, c, n + b + c)
    tight = judge(table, AuditConfig(tolerance=tolerance), [])[1]
    loose = judge(table, AuditConfig(tolerance=tolerance + more), [])[1]
    assert rank[tight.status] <= rank[loose.status]
    low, high = tango(b, c, table.n)
    if tight.status == "pass":
        assert high <= tolerance / 100
    assert not (high <= tolerance / 100 and low > tolerance / 100)


@given(st.integers(1, 400), st.floats(0, 100))
def test_a_floor_is_never_both(k, floor):
    table = Counts(400, 400, k)
    found = status(table, AuditConfig(min_robust=floor), [])
    if found == "pass":
        assert k / 400 > floor / 100
    if found == "fail":
        assert k / 400 < floor / 100
