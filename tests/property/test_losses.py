"""Losses on any logits: exact zeros, finite extremes, the constants between reductions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from robustkd.losses import cross_entropy, entropy, kl, margin, reduce

shapes = st.tuples(st.integers(1, 5), st.integers(2, 12))


def logits_of(shape: tuple[int, int], bound: float = 20.0) -> st.SearchStrategy[Tensor]:
    elements = st.floats(-bound, bound, width=32)
    return hnp.arrays(np.float32, shape, elements=elements).map(torch.from_numpy)


def pairs(bound: float = 20.0) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    return shapes.flatmap(lambda s: st.tuples(logits_of(s, bound), logits_of(s, bound)))


extreme = st.sampled_from([-1e30, -1e10, -1e4, -1.0, 0.0, 1.0, 1e4, 1e10, 1e30])


@given(pair=pairs(), shift=st.floats(-50, 50))
def test_kl_is_zero_where_the_softmaxes_agree(pair: tuple[Tensor, Tensor], shift: float) -> None:
    logits = pair[0].double()
    assert (kl(logits, logits) == 0).all()
    assert kl(logits, logits + shift).abs().max() < 1e-12


@given(pair=pairs())
def test_kl_is_zero_only_there(pair: tuple[Tensor, Tensor]) -> None:
    """Pinsker: KL >= |p - q|_1^2 / 2, so it cannot vanish anywhere else; and it is never negative."""
    p, q = (z.double().softmax(1) for z in pair)
    value = kl(pair[0].double(), pair[1].double())
    assert (value >= (p - q).abs().sum(1).square() / 2 - 1e-12).all()


@given(pair=pairs(50.0))
def test_kl_in_float32_is_non_negative_to_its_precision_and_near_float64(pair: tuple[Tensor, Tensor]) -> None:
    value, exact = kl(*pair), kl(pair[0].double(), pair[1].double())
    assert value.dtype == torch.float32
    assert (value >= -1e-5).all() and torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-4)


@given(pair=pairs(), shifts=st.tuples(st.floats(-30, 30), st.floats(-30, 30)), tau=st.floats(0.5, 30))
def test_kl_does_not_see_a_constant_added_to_all_logits(pair: tuple[Tensor, Tensor], shifts: Any, tau: float) -> None:
    reference, logits = (z.double() for z in pair)
    moved = kl(reference + shifts[0], logits + shifts[1], tau=tau)
    assert torch.allclose(moved, kl(reference, logits, tau=tau), atol=1e-9)


@given(data=st.data(), rows=st.integers(1, 4), classes=st.integers(2, 6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(data: st.DataObject, rows: int, classes: int, dtype: torch.dtype) -> None:
    entries = st.lists(st.lists(extreme, min_size=classes, max_size=classes), min_size=rows, max_size=rows)
    reference, logits = (torch.tensor(data.draw(entries), dtype=dtype).requires_grad_(True) for _ in range(2))
    y = torch.arange(rows) % classes
    values = {
        "kl": kl(reference, logits),
        "cross entropy": cross_entropy(logits, y),
        "margin": margin(logits, y),
        "entropy": entropy(logits),
    }
    for name, value in values.items():
        assert value.isfinite().all(), name
        grads = torch.autograd.grad(value.sum(), (reference, logits), allow_unused=True, retain_graph=True)
        assert all(g is None or g.isfinite().all() for g in grads), name


@given(pair=pairs(), tau=st.floats(0.1, 30))
def test_temperature_divides_both_logits_and_multiplies_nothing(pair: tuple[Tensor, Tensor], tau: float) -> None:
    reference, logits = (z.double() for z in pair)
    assert torch.allclose(kl(reference, logits, tau=tau), kl(reference / tau, logits / tau), atol=1e-12)


@given(pair=pairs())
def test_kl_is_cross_entropy_less_entropy(pair: tuple[Tensor, Tensor]) -> None:
    reference, logits = (z.double() for z in pair)
    crossed = -(reference.softmax(1) * logits.log_softmax(1)).sum(1)
    assert torch.allclose(kl(reference, logits), crossed - entropy(reference), atol=1e-10)


@given(pair=pairs())
def test_entropy_runs_from_zero_to_log_of_the_classes(pair: tuple[Tensor, Tensor]) -> None:
    value = entropy(pair[0].double())
    assert (value >= -1e-12).all() and (value <= np.log(pair[0].shape[1]) + 1e-12).all()


@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=20), classes=st.integers(2, 200))
def test_reductions_differ_by_known_constants(values: list[float], classes: int) -> None:
    rows = torch.tensor(values, dtype=torch.float64)
    total, bmean, emean = (reduce(rows, how, classes=classes).item() for how in ("sum", "bmean", "emean"))
    assert total == pytest.approx(sum(values))
    assert bmean == pytest.approx(total / len(values)) and emean == pytest.approx(bmean / classes)


@given(pair=pairs())
def test_emean_is_the_mean_over_all_entries(pair: tuple[Tensor, Tensor]) -> None:
    reference, logits = (z.double() for z in pair)
    log_p, log_q = reference.log_softmax(1), logits.log_softmax(1)
    entries = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none")
    ours = reduce(kl(reference, logits), "emean", classes=logits.shape[1])
    assert ours.item() == pytest.approx(entries.mean().item(), abs=1e-12)


small = st.sampled_from([-1.0, 0.0, 0.5, 2.0])


@given(rows=st.lists(st.tuples(st.lists(small, min_size=4, max_size=4), st.integers(0, 3)), min_size=1, max_size=8))
def test_margin_against_brute_force_with_ties(rows: list[tuple[list[float], int]]) -> None:
    logits, y = torch.tensor([z for z, _ in rows]), torch.tensor([label for _, label in rows])
    expected = [min(z[label] - z[c] for c in range(4) if c != label) for z, label in rows]
    found = margin(logits, y)
    assert found.tolist() == expected
    for value, z, label in zip(found.tolist(), logits.tolist(), y.tolist(), strict=True):
        assert (value > 0) == all(z[label] > z[c] for c in range(4) if c != label), "positive where the label wins strictly"


def test_margin_of_every_order_of_three_logits() -> None:
    for z in itertools.permutations([0.0, 1.0, 2.0]):
        for label in range(3):
            assert margin(torch.tensor([z]), torch.tensor([label])).item() == z[label] - max(z[:label] + z[label + 1 :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_any_softmax(dtype: torch.dtype) -> None:
    logits = torch.tensor([[60.0, 0.0, -8.0], [1.0, 1.0, 1.0]], dtype=dtype)
    y = torch.tensor([2, 0])
    for value in (cross_entropy(logits, y), kl(logits, logits), margin(logits, y), entropy(logits)):
        assert value.dtype == torch.float32 and value.shape == (2,)
    assert cross_entropy(logits, y)[0].item() == pytest.approx(68.0, rel=1e-6)
