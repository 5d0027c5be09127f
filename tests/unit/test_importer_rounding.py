"""Quantised and half-precision graphs: forward exact, backward straight through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from robustkd.engines.importer.load import import_onnx
from tests.unit.importer_graphs import FLOAT, FLOAT16, Case, by_runtime, images, imported, model

rng = np.random.default_rng(3)
INT8, UINT8 = np.int8, np.uint8


def chain(*nodes: Any, weights: dict[str, Any], **more: Any) -> Case:
    return Case([helper.make_node(op, i, o, **a) for op, i, o, a in nodes], weights, **more)


def there_and_back(scale: Any, zero: Any, **attributes: Any) -> Case:
    """The images through levels and back; without a zero point where it is None."""
    weights = {"s": np.asarray(scale, np.float32)} | ({} if zero is None else {"z": np.asarray(zero)})
    rest = ["s"] if zero is None else ["s", "z"]
    return chain(
        ("QuantizeLinear", ["images", *rest], ["q"], attributes),
        ("DequantizeLinear", ["q", *rest], ["y"], attributes),
        weights=weights,
    )


def ties(scale: float) -> Any:
    """Every half between two levels, and far beyond both ends; scale is a power of two, so that halves are exact."""
    halves = (np.arange(-300, 300) + 0.5) * scale
    return np.concatenate([halves, halves * 1e6, [0.0, -0.0]]).astype(np.float32).reshape(1, 2, 1, -1)


LEVELS = {
    "int8": INT8(0),
    "int8-shifted": INT8(-128),
    "int8-odd": INT8(17),
    "uint8": UINT8(0),
    "uint8-shifted": UINT8(131),
    "uint8-end": UINT8(255),
    "none": None,
}


@pytest.mark.parametrize("opset", [18, 20, 24])
@pytest.mark.parametrize("name", LEVELS)
def test_ties_and_saturation_are_bit_exact(name: str, opset: int) -> None:
    x = ties(0.25)
    made = model(there_and_back(0.25, LEVELS[name])._replace(shape=x.shape[1:]), opset)
    np.testing.assert_array_equal(imported(made)(torch.from_numpy(x)).numpy(), by_runtime(made, x))


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_every_axis_has_its_own_scale_and_zero_point(axis: int, opset: int) -> None:
    size = (3, 4, 5, 6)[axis]
    scale, zero = 0.01 + 0.05 * rng.random(size), rng.integers(-20, 20, size).astype(INT8)
    made = model(there_and_back(scale, zero, axis=axis), opset)
    x = images() * 2
    np.testing.assert_array_equal(imported(made)(torch.from_numpy(x)).numpy(), by_runtime(made, x))


@pytest.mark.parametrize("opset", [18, 20])
def test_weights_in_levels_and_a_whole_number_bias(opset: int) -> None:
    weights = {
        "w": rng.integers(-127, 128, (6, 4, 3, 3)).astype(INT8),
        "ws": (0.001 + 0.01 * rng.random(6)).astype(np.float32),
        "wz": np.zeros(6, INT8),
        "b": rng.integers(-(2**28), 2**28, 6).astype(np.int32),
        "bs": np.full(6, 1e-8, np.float32),
    }
    case = chain(
        ("DequantizeLinear", ["w", "ws", "wz"], ["weight"], {"axis": 0}),
        ("DequantizeLinear", ["b", "bs"], ["bias"], {"axis": 0}),
        ("Conv", ["images", "weight", "bias"], ["y"], {"pads": [1, 1, 1, 1]}),
        weights=weights,
    )
    made, x = model(case, opset), images()
    module = imported(made)
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), by_runtime(made, x), rtol=1e-5, atol=1e-5)
    assert len(module._steps) == 3  # the levels of the weights are turned into numbers once, not at every call


def gradient(made: Any, x: Any, rounding: str) -> Any:
    z = torch.from_numpy(x).requires_grad_(True)
    module = imported(made, rounding=rounding)
    (found,) = torch.autograd.grad(module(z).sum(), z)
    return found.numpy()


def test_the_three_ways_of_a_gradient_through_levels() -> None:
    made = model(there_and_back(0.5, INT8(10))._replace(shape=(1, 1, 4)), 20)
    x = np.array([[[[0.3, -69.0, -69.3, 58.9]]]], np.float32)  # the last two lie below -128 and above 127
    np.testing.assert_array_equal(gradient(made, x, "masked"), [[[[1, 1, 0, 0]]]])
    np.testing.assert_array_equal(gradient(made, x, "pass-through"), [[[[1, 1, 1, 1]]]])
    np.testing.assert_array_equal(gradient(made, x, "exact"), [[[[0, 0, 0, 0]]]])


@pytest.mark.parametrize("op", ["Round", "Floor", "Ceil", "Sign"])
def test_step_functions_pass_a_gradient_too(op: str) -> None:
    made = model(chain((op, ["images"], ["y"], {}), weights={}), 20)
    assert (gradient(made, images(), "masked") == 1).all() and (gradient(made, images(), "exact") == 0).all()


def test_the_rounding_of_a_module_can_be_changed() -> None:
    made = model(there_and_back(0.5, INT8(0)), 20)
    module, x = imported(made), torch.from_numpy(images()).requires_grad_(True)
    assert module.rounding == "masked"
    module.rounding = "exact"
    assert (torch.autograd.grad(module(x).sum(), x)[0] == 0).all()


def half_case() -> Case:
    """fp32 in and out, everything between in half precision, as fp16 exports are."""
    rng = np.random.default_rng(5)
    weights = {
        "w": (rng.normal(size=(8, 4, 3, 3)) * 0.3).astype(np.float16),
        "b": rng.normal(size=8).astype(np.float16),
        "v": rng.normal(size=(8, 5)).astype(np.float16),
        "axes": np.array([2, 3]),
    }
    return chain(
        ("Cast", ["images"], ["h"], {"to": FLOAT16}),
        ("Conv", ["h", "w", "b"], ["c"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["c"], ["r"], {}),
        ("ReduceMean", ["r", "axes"], ["m"], {"keepdims": 0}),
        ("MatMul", ["m", "v"], ["o"], {}),
        ("Cast", ["o"], ["y"], {"to": FLOAT}),
        weights=weights,
    )


def in_half(x: Any) -> Any:
    """The same by torch's half kernels."""
    w = {name: torch.from_numpy(value) for name, value in half_case().weights.items()}
    h = torch.nn.functional.conv2d(torch.from_numpy(x).half(), w["w"], w["b"], padding=1).relu()
    return (h.mean((2, 3)) @ w["v"]).float().numpy()


@pytest.mark.parametrize("opset", [18, 20])
def test_half_precision_is_rounded_after_every_node(opset: int) -> None:
    made, x = model(half_case(), opset), images(n=64)
    module = imported(made)
    got, want = module(torch.from_numpy(x)), by_runtime(made, x)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), got.numpy().astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-3 * np.ptp(want))  # which rounds less often on a CPU
    assert (got.numpy().argmax(1) == want.argmax(1)).mean() > 0.98
    np.testing.assert_allclose(got.numpy(), in_half(x), atol=1e-3 * np.ptp(want))
    plain = model(half_case(), opset)
    for weight in plain.graph.initializer:
        if weight.data_type == FLOAT16:
            from onnx import numpy_helper

            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), weight.name))
    plain.graph.node[0].attribute[0].i = FLOAT
    exact = import_onnx(plain)(torch.from_numpy(x)).numpy()
    assert 0 < np.abs(exact - got.numpy()).max() < 1e-2  # the roundings are really there


def test_half_precision_overflows_as_half_does_and_its_gradient_does_not_underflow() -> None:
    case = chain(
        ("Cast", ["images"], ["h"], {"to": FLOAT16}),
        ("Mul", ["h", "k"], ["m"], {}),
        ("Cast", ["m"], ["y"], {"to": FLOAT}),
        weights={"k": np.float16(6e4)},
    )
    made, x = model(case, 20), images()
    module = imported(made)
    with np.errstate(over="ignore"):
        want = (x.astype(np.float16) * np.float16(6e4)).astype(np.float32).reshape(len(x), -1)
    np.testing.assert_array_equal(module(torch.from_numpy(x)).numpy(), want)
    assert not np.isfinite(module(torch.from_numpy(x)).numpy()).all()
    z = torch.from_numpy(x).requires_grad_(True)
    (grad,) = torch.autograd.grad(module(z), z, torch.full((3, 120), 1e-14))
    assert (grad != 0).all()


def test_levels_of_another_type_are_refused_by_name() -> None:
    from robustkd.errors import ArtifactError

    made = model(there_and_back(0.5, np.int16(0)), 24)
    x = images()
    np.testing.assert_array_equal(imported(made)(torch.from_numpy(x)).numpy(), by_runtime(made, x))
    case = chain(("Cast", ["images"], ["b"], {"to": TensorProto.BFLOAT16}), ("Cast", ["b"], ["y"], {"to": FLOAT}), weights={})
    with pytest.raises(ArtifactError, match="Cast of node b"):
        imported(model(case, 20))
