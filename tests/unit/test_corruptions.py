"""Common corruptions: stronger is further away, every image has its own stream, and nothing is gated."""

import io
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from robustkd import reporting
from robustkd.auditing.corruptions import KINDS, STRENGTHS, corrupted, corruptions
from robustkd.auditing.sides import Side
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


def test_jpeg_is_what_pillow_writes_at_the_qualities_of_cifar_10_c():
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    floats = (image.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    for strength, quality in enumerate((80, 65, 58, 50, 40), 1):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        read = np.asarray(Image.open(file)).transpose(2, 0, 1)
        assert np.array_equal(np.round(corrupted(floats, "jpeg", strength, 0)[0] * 255), read)
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    assert np.abs(corrupted(grey, "jpeg", 1, 0) - grey).max() < 0.1
    assert np.array_equal(corrupted(grey, "jpeg", 3, 0), corrupted(grey, "jpeg", 3, 9))


@pytest.mark.parametrize(
    ("channels", "pillow", "says"), [(2, True, "these have 2"), (4, True, "these have 4"), (3, False, "robustkd[train]")]
)
def test_jpeg_is_left_out_with_its_reason(channels, pillow, says, monkeypatch):
    if not pillow:
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
    side = Side(lambda x: np.eye(4, dtype=np.float32)[: len(x)], 4)
    x, y = np.full((4, channels, 8, 8), 0.5, np.float32), np.arange(4)
    found = corruptions(side, None, x, y, 0)
    assert set(found) == set(KINDS) and found["jpeg"].engine == () and says in found["jpeg"].left_out
    assert all(c.engine == (1.0,) * STRENGTHS and not c.left_out for name, c in found.items() if name != "jpeg")
    page = reporting.render([ReportInput(result().model_copy(update={"corruptions": found}))])
    assert "left out: JPEG" in page


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
