"""Common corruptions: stronger is further away, every image has its own stream, and nothing is gated."""

from itertools import pairwise

import numpy as np
import pytest

from robustkd import reporting
from robustkd.auditing.corruptions import KINDS, STRENGTHS, corrupted
from robustkd.recipe.policy import read_policy
from robustkd.reporting.inputs import ReportInput
from robustkd.result import AuditResult, Corruption
from tests.unit.audit_samples import result
from tests.unit.test_audit_shards import order, plain

X = np.random.default_rng(0).random((6, 3, 12, 10), dtype=np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_images_stay_images_and_move_further_with_strength(kind):
    found = [corrupted(X, kind, strength, 0) for strength in range(1, STRENGTHS + 1)]
    assert all(x.shape == X.shape and x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1 for x in found)
    moved = [float(np.abs(x - X).mean()) for x in found]
    assert moved[0] > 0 and all(a <= b for a, b in pairwise(moved)), moved


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_those_after_it_and_the_seed_is_all(kind):
    whole = corrupted(X, kind, 3, 7)
    assert np.array_equal(corrupted(X[:2], kind, 3, 7), whole[:2])
    assert np.array_equal(corrupted(X, kind, 3, 7), whole)
    if "noise" in kind:
        assert not np.array_equal(corrupted(X, kind, 3, 8), whole)
        same = np.repeat(X[:1], 2, axis=0)
        noisy = corrupted(same, kind, 3, 7)
        assert not np.array_equal(noisy[0], noisy[1])


def test_known_values():
    grey = np.full((1, 1, 4, 4), 0.5, np.float32)
    assert corrupted(grey, "brightness", 2, 0) == pytest.approx(grey + 0.1)
    for kind in ("contrast", "pixelate", "blur"):
        assert corrupted(grey, kind, 5, 0) == pytest.approx(grey)
    ramp = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4) / 16
    halves = corrupted(ramp, "pixelate", 4, 0)[0, 0]
    assert halves[0, 0] == pytest.approx(ramp[0, 0, :2, :2].mean()) and halves[0, 0] == halves[1, 1] != halves[2, 2]


def test_they_are_in_the_result_and_change_nothing_else():
    from robustkd.auditing.run import carry_out

    policy = order(None).policy
    without = carry_out(order(None))[0]
    found = carry_out(order(None, policy=policy.model_copy(update={"corruptions": True})))[0]
    assert without.corruptions is None and set(found.corruptions) == set(KINDS)
    assert all(len(c.engine) == len(c.source) == STRENGTHS for c in found.corruptions.values())
    assert all(c.engine == c.source for c in found.corruptions.values())  # the engine is its source here
    assert found.corruptions["gaussian-noise"].engine[0] > 0.5
    left_out = {"corruptions", "policy"}
    assert {k: v for k, v in plain(found).items() if k not in left_out} == {
        k: v for k, v in plain(without).items() if k not in left_out
    }


def test_only_full_asks_for_them_and_the_page_shows_them():
    assert [read_policy(name).corruptions for name in ("quick", "standard", "full")] == [False, False, True]
    given = result().model_copy(update={"corruptions": {"blur": Corruption(engine=(0.9, 0.8, 0.7, 0.6, 0.123))}})
    page = reporting.render([ReportInput(AuditResult.model_validate_json(given.model_dump_json(by_alias=True)))])
    assert "Common corruptions" in page and "12.3 %" in page and "no part in the verdict" in page
