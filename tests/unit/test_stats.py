"""Intervals and paired tests: the vectors of the method note, and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkd.stats import clopper_pearson, mcnemar_exact, needed_n, needed_n_single, tango, wilson

VECTORS = [  # b, c, n, L %, U %, p
    (9, 3, 1000, 0.034, 1.275, 0.146),
    (16, 3, 1000, 0.633, 2.128, 0.0044),
    (3, 2, 1000, -0.337, 0.572, 1.0),
    (33, 5, 1000, 1.863, 3.910, 4.3e-6),
]


@pytest.mark.parametrize(("b", "c", "n", "low", "high", "p"), VECTORS)
def test_tango_and_mcnemar_vectors(b, c, n, low, high, p):
    found = tango(b, c, n)
    assert found[0] * 100 == pytest.approx(low, abs=6e-4)
    assert found[1] * 100 == pytest.approx(high, abs=6e-4)
    assert mcnemar_exact(b, c) == pytest.approx(p, rel=0.02)


def test_no_discordant_image():
    assert tango(0, 0, 300)[1] * 100 == pytest.approx(0.894, abs=6e-4)
    assert mcnemar_exact(0, 0) == 1.0
    for margin, n in ((0.005, 539), (0.01, 268), (0.02, 133), (0.03, 88)):
        assert tango(0, 0, n)[1] <= margin < tango(0, 0, n - 1)[1]
        assert needed_n(0.0, 0.0, margin) == n


def test_wilson_is_the_published_interval():
    low, high = wilson(251, 1000)
    assert (low, high) == (pytest.approx(0.2252, abs=2e-4), pytest.approx(0.2788, abs=2e-4))
    assert wilson(244, 1000) == (pytest.approx(0.218, abs=1e-3), pytest.approx(0.272, abs=1e-3))
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def test_clopper_pearson_rule_of_three():
    assert clopper_pearson(0, 100)[1] == pytest.approx(1 - 0.025 ** (1 / 100))
    assert clopper_pearson(100, 100) == (pytest.approx(0.025 ** (1 / 100)), 1.0)


TABLE = [
    (0.02, 0.005, 4947),
    (0.02, 0.01, 1237),
    (0.04, 0.01, 2474),
    (0.04, 0.02, 619),
    (0.10, 0.01, 6183),
    (0.02, 0.02, 310),
]


@pytest.mark.parametrize(("discordance", "margin", "n"), TABLE)
def test_sample_size_table(discordance, margin, n):
    # the table's z values are rounded: z^2 = 6.18256
    assert needed_n(discordance, 0.0, margin) == pytest.approx(n, abs=2)


@pytest.mark.parametrize(("drop", "discordance", "n"), [(0.02, 0.03, 1831), (0.03, 0.04, 605), (0.05, 0.06, 223)])
def test_sample_size_to_prove_a_fail(drop, discordance, n):
    assert needed_n(discordance, drop, 0.01, fail=True) == pytest.approx(n, abs=2)


def test_no_sample_is_large_enough_at_or_beyond_the_margin():
    assert needed_n(0.04, 0.01, 0.01) is None
    assert needed_n(0.04, 0.005, 0.01, fail=True) is None
    assert needed_n_single(0.5, 0.5) is None


WRONG = [lambda: wilson(3, 2), lambda: tango(3, 3, 5), lambda: mcnemar_exact(-1, 0), lambda: tango(0, 0, 0)]


@pytest.mark.parametrize("call", [*WRONG, lambda: clopper_pearson(-1, 3)])
def test_wrong_counts_are_refused(call):
    with pytest.raises(ValueError, match=r"count|table"):
        call()


tables = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 2000)).map(lambda t: (t[0], t[1], t[0] + t[1] + t[2]))


@given(tables)
def test_swapping_the_sides_changes_the_sign(table):
    b, c, n = table
    low, high = tango(b, c, n)
    swapped = tango(c, b, n)
    assert (low, high) == (pytest.approx(-swapped[1], abs=1e-9), pytest.approx(-swapped[0], abs=1e-9))
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)
    assert -1 <= low <= (b - c) / n + 1e-9 and (b - c) / n - 1e-9 <= high <= 1


@given(tables, st.integers(2, 10))
def test_the_upper_limit_falls_with_n(table, factor):
    b, c, n = table
    if b > c:  # the same share of more images: the limits close in
        assert tango(b * factor, c * factor, n * factor)[1] < tango(b, c, n)[1]
    assert tango(b, c, n * factor)[1] <= max(tango(b, c, n)[1], 0.0) + 1e-9


@given(st.integers(0, 300), st.integers(0, 300))
def test_intervals_hold_their_estimate(k, more):
    n = k + more
    for low, high in (wilson(k, n), clopper_pearson(k, n)):
        assert 0 <= low <= (k / n if n else low) <= high <= 1


@given(st.integers(10, 60), st.sampled_from([0.005, 0.01, 0.02]))
def test_needed_n_plugged_back_meets_the_margin(percent_times_ten, margin):
    discordance = percent_times_ten / 1000
    needed = needed_n(discordance, 0.0, margin, power=0.5)
    each = round(discordance * needed / 2)
    if each >= 8:  # the note: below about 20 discordant images the formula is 10 to 20 % short
        assert tango(each, each, needed)[1] == pytest.approx(margin, rel=0.2)


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_needed_n_single_plugged_back_decides(share, bound):
    n = needed_n_single(share, bound)
    if n is not None and n < 10**6:
        low, high = wilson(min(4 * n, round(share * 4 * n)), 4 * n)
        assert not low <= bound <= high
