"""The threat model and the one ascent loop hold for every image, radius and norm."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from robustkd.ascent import ascend, attacking
from robustkd.threat import Pixels, ThreatModel, parse_pixels
from tests.nets import SmallNet

norms = st.sampled_from(["linf", "l2"])
radii = st.one_of(st.just(0.0), st.floats(1e-4, 3.0))
seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
scales = st.sampled_from([1e-6, 1e-2, 1.0, 100.0])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(shape: tuple[int, ...], seed: int) -> Tensor:
    """Pictures whose pixels are often exactly black or white, where the two projections meet."""
    return (torch.rand(shape, generator=rng(seed)) * 1.6 - 0.3).clamp(0, 1)


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.square().sum(1).sqrt()


# --- projection


@given(norm=norms, eps=radii, shape=shapes, seed=seeds, scale=scales)
def test_projection_is_into_the_ball_and_the_range_and_idempotent(
    norm: Any, eps: float, shape: Any, seed: int, scale: float
) -> None:
    threat, x = ThreatModel(norm=norm, eps=eps), images(shape, seed)
    far = x + scale * torch.randn(shape, generator=rng(seed + 1))
    near = threat.project(far, x)
    assert (distance(near, x, norm) <= eps + 1e-6).all()
    assert near.min() >= 0 and near.max() <= 1
    assert torch.allclose(threat.project(near, x), near, atol=1e-6)
    assert torch.allclose(threat.distance(near, x), distance(near, x, norm))


@given(norm=norms, eps=radii, shape=shapes, seed=seeds)
def test_a_point_inside_stays_where_it_is(norm: Any, eps: float, shape: Any, seed: int) -> None:
    threat, x = ThreatModel(norm=norm, eps=eps), images(shape, seed)
    inside = (x + 0.99 * (threat.start(x, "uniform", rng(seed)) - x)).clamp(0, 1)
    assert torch.allclose(threat.project(inside, x), inside, atol=1e-7)


@given(norm=norms, shape=shapes, seed=seeds, scale=scales)
def test_a_ball_of_no_radius_is_the_image_itself(norm: Any, shape: Any, seed: int, scale: float) -> None:
    threat, x = ThreatModel(norm=norm, eps=0), images(shape, seed)
    assert torch.equal(threat.project(x + scale * torch.randn(shape, generator=rng(seed)), x), x)


@given(eps=radii, shape=shapes, seed=seeds)
def test_linf_projection_is_the_nearest_point(eps: float, shape: Any, seed: int) -> None:
    """Ball and range are boxes: the nearest point of both is found pixel by pixel."""
    x = images(shape, seed).double()
    far = x + torch.randn(shape, generator=rng(seed + 1)).double()
    lower, upper = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    assert torch.allclose(ThreatModel(eps=eps).project(far, x), far.maximum(lower).minimum(upper), atol=1e-12)


@given(seed=seeds, eps=st.floats(1e-3, 0.2))
def test_l2_projection_keeps_the_direction(seed: int, eps: float) -> None:
    x = torch.full((3, 3, 4, 4), 0.5)
    delta = torch.randn(x.shape, generator=rng(seed))
    moved = ThreatModel(norm="l2", eps=eps).project(x + delta, x) - x
    expected = eps * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_empty_batch_and_double_precision(norm: Literal["linf", "l2"]) -> None:
    threat, empty = ThreatModel(norm=norm), torch.rand(0, 3, 4, 4)
    assert threat.project(empty, empty).shape == threat.start(empty, "uniform").shape == threat.step(empty).shape == empty.shape
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert threat.start(x, "uniform").dtype == threat.project(x + 1, x).dtype == threat.step(x).dtype == torch.float64


# --- starts


@given(norm=norms, eps=radii, shape=shapes, seed=seeds)
def test_start_kinds(norm: Any, eps: float, shape: Any, seed: int) -> None:
    threat, x = ThreatModel(norm=norm, eps=eps), images(shape, seed)
    zero = threat.start(x, "zero", rng(seed))
    assert torch.equal(zero, x) and zero.data_ptr() != x.data_ptr()
    assert (distance(threat.start(x, "uniform", rng(seed)), x, norm) <= eps + 1e-6).all()
    noise = threat.start(x, "noise", rng(seed)) - x
    assert noise.any() and noise.abs().max() < 0.001 * 7
    for kind in ("noise", "uniform"):
        assert torch.equal(threat.start(x, kind, rng(seed)), threat.start(x, kind, rng(seed)))


def test_noise_start_is_a_thousandth_of_a_normal_neither_projected_nor_clamped() -> None:
    x = torch.zeros(64, 3, 16, 16)
    noise = ThreatModel(eps=1e-5).start(x, "noise", rng(0))
    assert noise.std().item() == pytest.approx(0.001, rel=0.02) and abs(noise.mean().item()) < 1e-5
    assert noise.min() < -0.003 and noise.abs().max() > 1e-4


def test_uniform_starts_fill_the_ball() -> None:
    x = torch.full((4000, 1, 1, 2), 0.5)
    linf = ThreatModel(eps=0.1).start(x, "uniform", rng(0)) - x
    assert linf.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    l2 = (ThreatModel(norm="l2", eps=0.1).start(x, "uniform", rng(0)) - x).flatten(1)
    radius = l2.norm(dim=1) / 0.1  # uniform in a disc: P(radius < r) = r^2
    assert (radius < 0.5).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert l2.mean(0).abs().max() < 0.003


# --- steps


@given(shape=shapes, seed=seeds, exponent=st.integers(-30, 15))
def test_steps_have_unit_length_however_small_the_gradient(shape: Any, seed: int, exponent: int) -> None:
    """A confident network's gradients are near 1e-25, whose squares underflow in float32."""
    grad = (torch.randn(shape, generator=rng(seed)).double() * 10.0**exponent).float()
    assume(bool((grad.flatten(1).abs().amax(1) > 0).all()))
    l2 = ThreatModel(norm="l2").step(grad).flatten(1).double()
    assert torch.allclose(l2.norm(dim=1), torch.ones(shape[0]).double(), atol=1e-5)
    assert ((l2 * grad.flatten(1).double()).sum(1) > 0).all()
    linf = ThreatModel().step(grad)
    assert torch.equal(linf, grad.sign())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_no_step(norm: Literal["linf", "l2"]) -> None:
    assert not ThreatModel(norm=norm).step(torch.zeros(2, 3, 4, 4)).any()


# --- distances in text


@given(top=st.integers(0, 10**6), bottom=st.integers(1, 10**6))
def test_quotients(top: int, bottom: int) -> None:
    for text in (f"{top}/{bottom}", f" {top} / {bottom} ", f"{float(top)}/{bottom}"):
        assert ThreatModel(eps=text).eps == top / bottom  # type: ignore[arg-type]


@given(value=st.floats(0, 1e6))
def test_decimals(value: float) -> None:
    assert parse_pixels(value) == value and ThreatModel(eps=repr(value)).eps == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    ["", "/", "8/", "/255", "8/0", "8/255/2", "far", "8 255", "-1/255", "8/-255", "nan", "inf", "1e999", "0x8", "8%", "8/0.0"],
)
def test_text_that_is_no_distance(value: str) -> None:
    with pytest.raises(ValidationError, match=r"pixel distance|finite"):
        ThreatModel(eps=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, False, None, [8], {"eps": 1}])
def test_what_is_no_distance(value: Any) -> None:
    with pytest.raises(ValidationError):
        ThreatModel(eps=value)


@given(text=st.text(max_size=12))
def test_any_text_is_a_distance_or_a_validation_error(text: str) -> None:
    try:
        value = TypeAdapter(Pixels).validate_python(text)
    except ValidationError:
        return
    assert math.isfinite(value) and value >= 0


def test_a_threat_model_is_a_frozen_value() -> None:
    with pytest.raises(ValidationError):
        ThreatModel(epsilon=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        ThreatModel().eps = 1  # type: ignore[misc]
    assert ThreatModel.model_validate_json(ThreatModel(norm="l2", eps=0.5).model_dump_json()) == ThreatModel(norm="l2", eps=0.5)


# --- the loop


def linear(weight: Tensor) -> Any:
    return lambda x_adv: (x_adv * weight).flatten(1).sum(1)


@given(eps=st.floats(1e-3, 0.6), shape=shapes, seed=seeds, start=st.sampled_from(["zero", "noise", "uniform"]))
def test_linf_ascent_of_a_linear_objective_reaches_the_corner(eps: float, shape: Any, seed: int, start: Any) -> None:
    x, weight = images(shape, seed), torch.randn(shape, generator=rng(seed + 1))
    found = ascend(linear(weight), x, threat=ThreatModel(eps=eps), steps=12, step_size=eps / 4, start=start, rng=rng(seed))
    assert torch.allclose(found, (x + eps * weight.sign()).clamp(0, 1), atol=1e-6)


@given(eps=st.floats(1e-3, 0.4), shape=shapes, seed=seeds)
def test_l2_ascent_of_a_linear_objective_reaches_the_pole(eps: float, shape: Any, seed: int) -> None:
    x, weight = torch.full(shape, 0.5), torch.randn(shape, generator=rng(seed))
    threat = ThreatModel(norm="l2", eps=eps)
    found = ascend(linear(weight), x, threat=threat, steps=3, step_size=eps, start="zero")
    pole = x + eps * weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(found, pole, atol=1e-5)


@given(norm=norms, eps=radii, shape=shapes, seed=seeds, steps=st.integers(0, 4), step_size=st.floats(1e-4, 2))
def test_every_ascent_stays_inside(norm: Any, eps: float, shape: Any, seed: int, steps: int, step_size: float) -> None:
    x, threat = images(shape, seed), ThreatModel(norm=norm, eps=eps)
    objective = linear(torch.randn(shape, generator=rng(seed + 1)))
    found = ascend(objective, x, threat=threat, steps=steps, step_size=step_size, rng=rng(seed))
    assert (distance(found, x, norm) <= eps + 1e-6).all() and found.min() >= 0 and found.max() <= 1
    assert not found.requires_grad and found.dtype == x.dtype
    if eps == 0:
        assert torch.equal(found, x)


def test_one_step_from_the_image_is_the_fast_gradient_sign() -> None:
    x, weight = torch.full((2, 3, 4, 4), 0.5), torch.randn(2, 3, 4, 4, generator=rng(0))
    found = ascend(linear(weight), x, threat=ThreatModel(eps=0.1), steps=1, step_size=0.03, start="zero")
    assert torch.allclose(found, x + 0.03 * weight.sign())


def test_without_steps_the_projected_start_comes_back() -> None:
    x = images((3, 3, 4, 4), 0)
    threat = ThreatModel(eps=0.0005)

    def never(x_adv: Tensor) -> Tensor:
        raise AssertionError("no step, no objective")

    found = ascend(never, x, threat=threat, steps=0, step_size=1, start="noise", rng=rng(1))
    assert torch.equal(found, threat.project(threat.start(x, "noise", rng(1)), x))
    assert torch.equal(ascend(never, x, threat=threat, steps=0, step_size=1, start="zero"), x)


@pytest.mark.parametrize("start", ["noise", "uniform"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_only_the_given_generator_is_used(start: Any, norm: Any) -> None:
    x, weight = images((3, 3, 4, 4), 0), torch.randn(3, 3, 4, 4, generator=rng(9))
    before = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        threat = ThreatModel(norm=norm, eps=0.5)
        return ascend(linear(weight), x, threat=threat, steps=1, step_size=1e-4, start=start, rng=rng(seed))

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_gradient_is_taken_at_the_unprojected_start_and_every_later_one_inside() -> None:
    x, threat = torch.zeros(2, 1, 3, 3), ThreatModel(eps=0.1)
    visited: list[Tensor] = []

    def objective(x_adv: Tensor) -> Tensor:
        visited.append(x_adv.detach().clone())
        return x_adv.flatten(1).sum(1)

    ascend(objective, x, threat=threat, steps=3, step_size=0.01, rng=rng(0))
    assert len(visited) == 3 and visited[0].min() < 0, "noise is not clamped before the first gradient"
    assert all(point.min() >= 0 for point in visited[1:])


def test_it_works_where_gradients_are_switched_off() -> None:
    x, weight = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, 1, 2, 2)
    with torch.no_grad():
        found = ascend(linear(weight), x, threat=ThreatModel(eps=0.1), steps=5, step_size=0.05, start="zero")
    assert torch.allclose(found, x + 0.1)


def test_images_do_not_influence_each_other() -> None:
    net, x, threat = SmallNet().eval(), images((4, 3, 6, 6), 0), ThreatModel(eps=0.05)

    def run(part: Tensor) -> Tensor:
        return ascend(lambda a: net(a)[:, 0], part, threat=threat, steps=3, step_size=0.02, start="zero")

    assert torch.allclose(run(x), torch.cat([run(x[:1]), run(x[1:])]), atol=1e-6)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attacking_gives_every_layer_its_own_flag_back(mode: Any) -> None:
    net = SmallNet().train()
    net.norm.eval()  # a frozen batch norm inside a network in training
    with pytest.raises(RuntimeError), attacking(net, mode) as inside:
        assert inside is net and all(m.training == (mode == "train") for m in net.modules())
        raise RuntimeError
    assert net.training and net.conv.training and not net.norm.training
