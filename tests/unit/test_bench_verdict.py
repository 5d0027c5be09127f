"""The verdict's error rates, from the exact probability of every table."""

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.verdict import CASES, Truth, exact, simulated

#: the margin cases whose tables are few
MARGIN = [case for case in CASES if case.drop == case.margin and case.n * case.discordance < 30]


@pytest.mark.parametrize("case", MARGIN, ids=lambda case: f"{case.n}-{case.discordance}")
def test_a_pass_at_the_margin_is_rare(case):
    found = exact(case)
    assert found["pass"] <= 0.055 and sum(found.values()) == pytest.approx(1, abs=1e-6)
    assert simulated(case, 4000, np.random.default_rng(1))["pass"] == pytest.approx(found["pass"], abs=0.014)


def test_the_corner_where_the_score_test_errs():
    """268 images and no disagreement: Tango's limit is below a point, the exact one is not; 299 settle it."""
    assert exact(Truth(268, 0.01, 0.01, 0.01, ""))["pass"] < 0.05
    assert 0.045 < exact(Truth(299, 0.01, 0.01, 0.01, ""))["pass"] <= 0.05


def test_power_as_tabled():
    case = next(c for c in CASES if c.n == 618 and c.drop == 0)
    found = exact(case)
    assert found["pass"] == pytest.approx(0.66, abs=0.02) and found["fail"] < 1e-4


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("bench.verdict.CASES", MARGIN[:1])
    assert main(["verdict", "--draws", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["draws"] == 50 and len(found["rows"]) == 1
    assert main(["verdict", "--draws", "50"]) == 0
    assert capsys.readouterr().out.startswith("| n |")
