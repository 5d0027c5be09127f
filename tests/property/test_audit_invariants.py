"""The twenty invariants of an audit: where each is tested, and here those that no other file tests."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkd.attacks import _apgd
from robustkd.auditing.run import run_audit
from robustkd.auditing.verdict import Counts, Pair, judge
from robustkd.catalog import Shelf
from robustkd.engines.ort import OrtEngine
from robustkd.losses import cross_entropy
from robustkd.recipe.policy import AuditConfig, Gates, Policy
from robustkd.threat import ThreatModel
from tests.audit_cheats import honest
from tests.audit_nets import Conv, Quadrants, TorchEngine, images, linear, radius, trained
from tests.unit.test_audit_run import FACTS

#: invariant -> the tests that hold it
COVERED = {
    "1 ball, range, finite, shape, order, inputs untouched": [
        "property/test_audit_levels.py::test_every_stored_image_lies_in_the_ball_and_shows_its_flag",
        "unit/test_attacks.py::test_stays_in_the_ball_and_leaves_no_trace",
        "property/test_threat.py::test_projection_is_into_the_ball_and_the_range_and_idempotent",
    ],
    "2 eps 0 and no steps leave the input": [
        "property/test_audit_levels.py::test_eps_zero_changes_no_image",
        "unit/test_attacks.py::test_eps_zero_and_the_empty_batch_return_the_input",
        "unit/test_audit_run.py::test_eps_zero_leaves_clean_accuracy",
        "property/test_audit_invariants.py::test_no_effort_returns_the_input",
    ],
    "3 wrong when clean: never attacked, never robust": [
        "property/test_audit_levels.py::test_every_stored_image_lies_in_the_ball_and_shows_its_flag",
        "unit/test_audit_run.py::test_wrong_when_clean_is_never_attacked_and_never_robust",
    ],
    "4 a flag is what the stored image shows; a tie or no number is broken": [
        "property/test_audit_levels.py::test_every_stored_image_lies_in_the_ball_and_shows_its_flag",
        "unit/test_audit_run.py::test_flags_are_what_the_stored_images_show",
        "unit/test_audit_checks.py::test_ties_and_non_numbers_are_never_robust",
    ],
    "5 the worst case is the AND; more attacks never raise it": [
        "property/test_audit_levels.py::test_the_worst_case_is_the_and_over_every_level",
        "unit/test_audit_run.py::test_the_worst_case_is_the_and_over_attacks_and_more_attacks_never_raise_it",
    ],
    "6 a warm-started ladder is monotone for every image; independent runs at growing eps fall within noise": [
        "unit/test_audit_ladder.py::test_a_fallen_image_never_rises_again",
        "unit/test_audit_effort.py::test_a_rise_blocks_beyond_chance_only",
        "unit/test_audit_plots.py::test_the_ladder_is_what_s6_says",
    ],
    "7 the best loss is kept": [
        "property/test_attack_invariants.py::test_what_comes_back_is_no_better_for_the_defender",
        "property/test_audit_invariants.py::test_the_best_loss_never_falls",
        "property/test_audit_invariants.py::test_what_comes_back_is_no_better_for_the_defender",
    ],
    "8 the same seed, no trace in random states, modes and gradients": [
        "property/test_audit_levels.py::test_the_same_seed_gives_the_same_bits_and_leaves_no_trace",
        "property/test_attack_invariants.py::test_an_exception_leaves_nothing_behind",
        "unit/test_attacks.py::test_stays_in_the_ball_and_leaves_no_trace",
        "unit/test_attacks.py::test_another_seed_is_another_search",
        "unit/test_attacks.py::test_state_is_restored_after_an_error",
    ],
    "9 batch size, order and shards": [
        "property/test_audit_levels.py::test_batch_size_and_order_change_no_flag",
        "property/test_audit_levels.py::test_two_shards_in_any_order_are_the_whole",
        "unit/test_audit_shards.py::test_white_box_attacks_of_a_whole_batch_too",
        "unit/test_square_ties.py::test_batch_order_and_company_change_nothing",
        "unit/test_rays.py::test_images_are_searched_each_for_itself",
        "unit/test_hopskipjump.py::test_images_are_searched_each_for_itself",
        "property/test_audit_invariants.py::test_batch_size_and_order_change_no_flag",
    ],
    "10 killed and resumed; another identity is refused": [
        "unit/test_audit_resume.py::test_interrupted_and_resumed_equals_uninterrupted",
        "unit/test_audit_resume.py::test_killed_without_warning",
        "unit/test_audit_resume.py::test_another_identity_is_refused",
    ],
    "11 the radius of a linear model": [
        "property/test_attack_invariants.py::test_no_attack_breaks_a_linear_net_within_its_radius",
        "property/test_attack_invariants.py::test_strong_attacks_break_it_just_above",
        "unit/test_attacks.py::test_linear_radius_in_closed_form",
        "unit/test_audit_run.py::test_a_linear_engine_has_exactly_the_robust_accuracy_its_weights_say",
        "property/test_audit_invariants.py::test_no_attack_breaks_a_linear_model_within_its_radius",
    ],
    "12 APGD is the authors'; leaving changes no flag": [
        "unit/test_apgd.py::test_every_query_is_the_authors_until_an_image_leaves",
        "unit/test_apgd.py::test_leaving_changes_no_flag_and_saves_queries",
    ],
    "13 a surrogate of a network by itself is the white-box attack": [
        "unit/test_audit_twin.py::test_engine_equal_to_source_is_the_white_box_attack"
    ],
    "14 monotone transforms of the logits hide nothing": [
        "unit/test_audit_twin.py::test_a_monotone_transform_of_the_logits_hides_nothing",
        "unit/test_audit_checks.py::test_s13_sees_through_the_scale_of_the_logits",
    ],
    "15 the twin of a QDQ graph": [
        "unit/test_importer_nets.py::test_levels_give_the_runtimes_classes",
        "unit/test_importer_nets.py::test_a_gradient_passes_the_levels",
        "unit/test_importer_nets.py::test_the_exact_derivative_of_levels_is_zero_everywhere",
    ],
    "16 8-bit images": [
        "unit/test_audit_eight_bit.py::test_the_nearest_8_bit_image_of_the_ball",
        "unit/test_audit_eight_bit.py::test_the_native_attack_returns_8_bit_images_of_the_ball",
    ],
    "17 queries are counted, budgets kept": [
        "property/test_audit_levels.py::test_forward_calls_are_what_each_side_received",
        "unit/test_audit_run.py::test_forward_calls_are_what_the_engine_received",
        "unit/test_attacks.py::test_forwards_are_the_images_the_model_received",
        "property/test_audit_invariants.py::test_a_budget_is_never_exceeded",
    ],
    "18 an engine of fixed batch": ["property/test_audit_invariants.py::test_a_fixed_batch_gives_the_flags_of_a_free_one"],
    "19 the verdict": [
        "unit/test_stats.py::test_tango_and_mcnemar_vectors",
        "unit/test_stats.py::test_swapping_the_sides_changes_the_sign",
        "unit/test_stats.py::test_the_upper_limit_falls_with_n",
        "unit/test_stats.py::test_needed_n_plugged_back_meets_the_margin",
        "unit/test_audit_verdict.py::test_loosening_a_bound_never_worsens_a_verdict",
        "property/test_audit_invariants.py::test_pass_and_fail_exclude_each_other",
    ],
    "20 report, schema, exit codes": [
        "unit/test_audit_resume.py::test_the_written_bundle",
        "unit/test_reporting.py::test_figures_equal_those_of_the_result_file",
        "unit/test_audit_verdict.py::test_every_verdict_has_its_exit_code",
        "unit/test_audit_verb.py::test_exit_codes",
    ],
}
TESTS = Path(__file__).parents[1]


def test_every_invariant_has_a_test_that_exists():
    assert [int(name.split()[0]) for name in COVERED] == list(range(1, 21))
    for place in (place for places in COVERED.values() for place in places):
        file, name = place.split("::")
        assert re.search(rf"^ *def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), place


def batch(n, seed=0):
    data = images(n, seed=seed)
    return torch.from_numpy(data.floats()), torch.from_numpy(data.labels)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return trained(Conv(), images(64, seed=9))


@pytest.mark.parametrize(("name", "knob"), [("pgd", {"steps": 0}), ("noise", {"draws": 0})])
def test_no_effort_returns_the_input(name, knob, net):
    x, y = batch(8)
    assert torch.equal(Shelf("attacks").get(name)(**knob).perturb(net, x, y, ThreatModel(), seed=0).x_adv, x)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_best_loss_never_falls(name, norm, net, monkeypatch):
    seen = []
    enter = _apgd._Climb.enter

    def watching(self, loss, grad):
        before = self.best_loss.clone()
        enter(self, loss, grad)
        seen.append(bool((self.best_loss >= before).all() and (self.best_loss >= loss).all()))

    monkeypatch.setattr(_apgd._Climb, "enter", watching)
    x, y = batch(16)
    threat = ThreatModel(norm=norm, eps=0.02 if norm == "linf" else 0.2)
    Shelf("attacks").get(name)(steps=10).perturb(net, x, y, threat, seed=0)
    assert len(seen) >= 10 and all(seen)


@settings(max_examples=5)
@given(st.integers(0, 1000), st.sampled_from(["apgd-ce", "square", "square-ties"]))
def test_what_comes_back_is_no_better_for_the_defender(net, seed, name):
    x, y = batch(12, seed)
    attack = Shelf("attacks").get(name)(**({"steps": 8} if name == "apgd-ce" else {"queries": 20}))
    with torch.no_grad():
        before = cross_entropy(net(x), y)
        after = cross_entropy(net(attack.perturb(net, x, y, ThreatModel(eps=0.03), seed=seed).x_adv), y)
    assert (after >= before - 1e-5).all()


#: attacks whose randomness is that of each image
ALONE = Policy(
    name="alone", noise_draws=0, pgd_steps=0, apgd_steps=0, targets=0, square_queries=0, square_ties_queries=25,
    rays_queries=25, rays_always=True, hopskipjump_queries=60, hopskipjump_always=True, uint8="post",
    ladder_images=0, scale_images=0, memory_images=0,
)  # fmt: skip


def flags(engine, data, size, policy=ALONE, **more):
    audit = AuditConfig(batch_size=size, tolerance=8)
    _, arrays = run_audit(engine, artifact=FACTS, images=data, threat=ThreatModel(eps=0.05), policy=policy, audit=audit, **more)
    return arrays.ledger.engine.robust()


def test_batch_size_and_order_change_no_flag():
    data = images(24)

    def coarse():
        return TorchEngine(Quadrants(), answer=lambda net, x: (net(x) * 4).round() / 4)

    whole = flags(coarse(), data, 64)
    assert 0 < whole.sum() < 24
    assert np.array_equal(flags(coarse(), data, 1), whole) and np.array_equal(flags(coarse(), data, 7), whole)
    order = np.random.default_rng(0).permutation(24)
    assert np.array_equal(flags(coarse(), data.take(order), 7), whole[order])


@settings(max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([2, 10]))
def test_no_attack_breaks_a_linear_model_within_its_radius(seed, classes):
    net = linear(classes, seed=seed % 7)
    x = 0.5 + 0.05 * torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = net(x).argmax(1)
        eps = 0.99 * float(radius(net, x).min())
    if eps < 1e-3:
        return
    for name in Shelf("attacks").names():
        attack = Shelf("attacks").get(name)
        knob = next(key for key in ("steps", "queries", "draws") if key in attack.model_fields)
        adv = attack(**{knob: 6}).perturb(net, x, y, ThreatModel(eps=eps), seed=seed).x_adv
        with torch.no_grad():
            assert (net(adv).argmax(1) == y).all(), name


@pytest.mark.parametrize("name", ["square", "square-ties", "rays", "hopskipjump"])
@pytest.mark.parametrize("budget", [1, 5, 30])
def test_a_budget_is_never_exceeded(name, budget):
    """Besides its queries: one look each of the guard before and after, the clean image, and the first square."""
    x, y = batch(6)
    for i in range(6):  # alone, so that no image spends the queries of another
        attack = Shelf("attacks").get(name)(queries=budget)
        found = attack.perturb(Quadrants(), x[i : i + 1], y[i : i + 1], ThreatModel(eps=0.02), seed=0)
        assert found.forwards <= budget + (2 if name in ("rays", "hopskipjump") else 4)


def test_a_fixed_batch_gives_the_flags_of_a_free_one(tmp_path):
    free = honest(tmp_path / "free.onnx")
    model = onnx.load(free)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, tmp_path / "fixed.onnx")
    policy = ALONE.model_copy(update={"pgd_steps": 3, "apgd_steps": 4, "square_queries": 10, "targets": 1})
    data = images(13)
    found = []
    for name in ("free.onnx", "fixed.onnx"):
        with OrtEngine(tmp_path / name) as engine:
            assert engine.logits(np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 4)
            found.append(flags(engine, data, 64, policy, twin=Quadrants()))
            one = int(np.flatnonzero(found[-1])[0])
            alone = flags(engine, data.take(np.array([one])), 64, policy, twin=Quadrants())
            assert alone.shape == (1,)
    assert np.array_equal(*found) and 0 < found[0].sum() < 13


@settings(max_examples=60)
@given(st.integers(30, 2000), st.data())
def test_pass_and_fail_exclude_each_other(n, data):
    b = data.draw(st.integers(0, n // 3))
    c = data.draw(st.integers(0, n // 3))
    points = data.draw(st.floats(0.1, 20))
    status = judge(Counts(n, n, n - b, Pair(0, 0), Pair(b, c)), Gates(clean_drop=99.0, robust_drop=points), [])[1].status
    swapped = judge(Counts(n, n, n - c, Pair(0, 0), Pair(c, b)), Gates(clean_drop=99.0, robust_drop=points), [])[1].status
    assert status in ("pass", "fail", "inconclusive")
    assert not (status == "fail" and swapped == "fail"), "both cannot be worse than the other"
    if status == "fail":
        assert (b - c) / n > points / 100
    if status == "pass":
        assert (b - c) / n <= points / 100
