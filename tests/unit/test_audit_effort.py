"""S6, S8, S14, S16 and S17 on flags and engines made to fire them."""

import numpy as np
import pytest
import torch

from robustkd.auditing import controls, effort
from robustkd.auditing.sides import Judged
from tests.audit_nets import Quadrants, TorchEngine, images
from tests.unit.test_audit_run import LAX, SMALL, go, statuses

HARD = SMALL.model_copy(update={"effort_images": 32, "effort_steps": 10})


def flags(robust, n=40):
    return np.arange(n) < robust


@pytest.mark.parametrize(
    ("left", "status"),
    [
        ([40, 30, 20, 0], "ok"),
        ([40, 30, 30, 30], "ok"),
        ([40, 10, 13, 0], "ok"),
        ([40, 10, 15, 0], "warn"),
        ([40, 5, 20, 0], "block"),
    ],
)
def test_a_rise_blocks_beyond_chance_only(left, status):
    check = effort._no_rise("S6", {str(i): flags(k) for i, k in enumerate(left)}, "seen")
    assert check.status == status, check


def test_a_rise_further_down_the_ladder_counts_too():
    runs = {"a": flags(10), "b": flags(12), "c": flags(14), "d": flags(30)}
    assert effort._no_rise("S6", runs, "seen").status == "block"


def test_s8_says_when_the_attacks_of_the_audit_had_not_converged():
    data = images(48)
    weak = HARD.model_copy(update={"pgd_steps": 1, "apgd_steps": 0, "noise_draws": 0, "square_queries": 0, "uint8": "none"})
    net = Quadrants()
    result, _ = go(TorchEngine(net), data, source=net, policy=weak.model_copy(update={"effort_steps": 20}))
    check = next(c for c in result.checks if c.name.startswith("S8"))
    assert check.status in ("warn", "block") and "converged" in check.message
    strong, _ = go(TorchEngine(net), data, source=net, policy=HARD)
    assert next(c for c in strong.checks if c.name.startswith("S8")).status == "ok"


def test_zero_leaves_a_check_out():
    none = SMALL.model_copy(update={"ladder_images": 0, "scale_images": 0, "memory_images": 0})
    result, _ = go(TorchEngine(Quadrants()), images(32), source=Quadrants(), policy=none)
    assert {"S6", "S8", "S14"} <= statuses(result, "skipped") and not statuses(result, "block")


def test_s16_without_unseen_images_blocks_what_only_mirroring_shows():
    """Labels that turn with the image cannot be told from memorised ones, unless unseen images clear the engine."""
    data = images(48)
    alone, _ = go(TorchEngine(Quadrants()), data, unseen=None)
    assert "S16" in statuses(alone, "block")
    cleared, _ = go(TorchEngine(Quadrants()), data)
    assert "S16" in statuses(cleared, "warn")
    held, _ = go(TorchEngine(Quadrants()), data, source=Quadrants(), unseen=None)
    assert "S16" in statuses(held, "ok")


def test_s17_sees_labels_that_reach_the_engine():
    y = np.arange(60) % 4
    told = np.random.default_rng(3).permutation(y)
    margins = np.ones(60)
    assert controls.labels_matter(Judged(y.copy(), margins), y, 3).status == "ok"
    assert controls.labels_matter(Judged(told, margins), y, 3).status == "block"


def test_s17_sees_a_network_whose_weights_do_not_matter():
    data = images(48)
    result, _ = go(TorchEngine(Quadrants(), answer=lambda net, x: Quadrants()(x)), data, twin=Weightless(), audit=LAX)
    assert "S17" in statuses(result, "block")


def test_s17_shuffles_nothing_where_there_are_no_weights():
    """The graph of a file of plain arithmetic has constants and no weights: that is no reason to block it."""
    data = images(48)
    result, _ = go(TorchEngine(Quadrants()), data, twin=Bare(), audit=LAX)
    assert "S17" in statuses(result, "ok")


class Bare(torch.nn.Module):
    def forward(self, x):
        return Quadrants()(x)


class Weightless(Quadrants):
    def forward(self, x):
        return Quadrants()(x)
