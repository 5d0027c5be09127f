"""The ladder and the loss landscape: as figures in the result, as drawings on the page."""

import re

import numpy as np
import pytest

from robustkd.recipe.policy import read_policy
from robustkd.reporting import inputs
from robustkd.reporting.html import render
from robustkd.result import AuditResult, EpsCurve, Landscape
from robustkd.threat import ThreatModel
from tests.audit_cheats import CHEATS, Cheating, Known
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.audit_samples import result
from tests.unit.test_audit_run import SMALL, go

POLICY = SMALL.model_copy(
    update={
        "apgd_steps": 0,
        "square_queries": 0,
        "scale_images": 0,
        "memory_images": 0,
        "landscape_images": 3,
        "ladder_images": 16,
    }
)


@pytest.fixture(scope="module")
def data():
    return images(48)


@pytest.fixture(scope="module", params=["linf", "l2"])
def honest(request, data):
    threat = ThreatModel(norm=request.param, eps=0.06 if request.param == "linf" else 0.5)
    return go(TorchEngine(Quadrants()), data, source=Quadrants(), policy=POLICY, threat=threat)[0]


def test_the_ladder_is_what_s6_says(honest):
    curve = honest.eps_curve
    said = next(check.message for check in honest.checks if check.name.startswith("S6"))
    assert curve.eps == tuple(part * honest.threat.eps for part in (0, 0.25, 0.5, 1, 2, 4))
    assert curve.survive[0] == 1 and list(curve.survive) == sorted(curve.survive, reverse=True)
    assert said.startswith(", ".join(f"{100 * part:.0f}" for part in curve.survive)) and f"of {curve.images} images" in said


def test_an_honest_loss_rises_along_the_gradient(honest):
    seen = honest.landscape
    grid = np.array(seen.loss, np.float64)
    assert grid.shape == (3, 21, 21) and len(seen.along) == 21 and seen.along[10] == 0
    assert seen.falling < 0.02
    assert (grid[:, 20, 10] > grid[:, 10, 10]).all() and (grid[:, 0, 10] < grid[:, 10, 10]).all()
    assert AuditResult.model_validate_json(honest.model_dump_json(by_alias=True)).landscape == seen


def test_a_shattered_loss_falls_as_often_as_it_rises(data):
    net = Cheating(CHEATS["sinusoid"](Known(data.floats(), data.labels)))
    found, _ = go(TorchEngine(net), data, twin=net, policy=POLICY)
    assert 0.3 < found.landscape.falling < 0.7


def test_no_number_counts_as_no_rise_and_leaves_a_gap(data):
    found, _ = go(TorchEngine(Quadrants(), answer=CHEATS["validator"](None)), data, source=Quadrants(), policy=POLICY)
    assert found.landscape.falling > 0.9 and found.landscape.loss[0][3][4] is None
    assert "<figure" in render([inputs.ReportInput(found)])


def test_only_the_full_policy_draws_it(data):
    assert [read_policy(name).landscape_images for name in ("quick", "standard", "full")] == [0, 0, 5]
    bare = POLICY.model_copy(update={"ladder_images": 0, "landscape_images": 0})
    found, _ = go(TorchEngine(Quadrants()), data, source=Quadrants(), policy=bare)
    assert found.eps_curve is None and found.landscape is None
    page = render([inputs.ReportInput(found)])
    assert "Around the images" not in page


def test_the_page_shows_both_and_nothing_leaves_it():
    along = tuple(np.linspace(-8 / 255, 8 / 255, 21).tolist())
    loss = tuple(tuple(tuple(float(i * j) for j in range(21)) for i in range(21)) for _ in range(2))
    more = {
        "eps_curve": EpsCurve(attack="pgd-20", images=64, eps=(0, 8 / 255), survive=(1.0, 0.3125)),
        "landscape": Landscape(images=(4, 7), along=along, loss=loss, falling=0.0425),
    }
    given = inputs.ReportInput(result(**more))
    page = render([given, given])
    assert page.count("Around the images") == 2 and "31.2 %" in page and "image 7" in page and "8/255" in page
    assert 'value="0.0425">4.2 %' in page or 'value="0.0425">4.3 %' in page
    assert not re.findall(r'(?:href|src)="(?!#|data:|runs|https://github)[^"]*"', page), "the page stands alone"
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and page == render([given, given])
