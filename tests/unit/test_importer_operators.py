"""Every operator of the importer against ONNX Runtime, one tiny graph each, and its gradient against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from robustkd.engines.importer.table import OPERATORS
from tests.unit.importer_graphs import BOOL, FLOAT, FLOAT16, INT64, Case, by_runtime, images, imported, model, one

rng = np.random.default_rng(7)


def f(*shape: int, scale: float = 0.5) -> Any:
    return (rng.normal(size=shape) * scale).astype(np.float32)


def positive(*shape: int) -> Any:
    return (rng.random(shape) + 0.5).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def chain(*nodes: Any, weights: dict[str, Any] | None = None, **more: Any) -> Case:
    """Nodes written (op, inputs, outputs, attributes)."""
    return Case([helper.make_node(op, i, o, **a) for op, i, o, a in nodes], weights or {}, **more)


def both(op: str, **more: Any) -> Case:
    """An operator of the absolute value of the images, plus a little."""
    weights = {"little": np.float32(0.3)}
    steps = [("Abs", ["images"], ["a"], {}), ("Add", ["a", "little"], ["p"], {}), (op, ["p"], ["y"], more)]
    return chain(*steps, weights=weights)


CASES: dict[str, Case] = {
    # convolutions and products
    "conv": one("Conv", f(6, 4, 3, 3), f(6), pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
    "conv-odd-pads": one("Conv", f(6, 4, 3, 2), f(6), pads=[0, 1, 2, 3], strides=[2, 1]),
    "conv-groups": one("Conv", f(8, 2, 3, 3), None, group=2, pads=[1, 1, 1, 1]),
    "conv-depthwise": one("Conv", f(4, 1, 3, 3), f(4), group=4, strides=[2, 2], pads=[1, 1, 1, 1]),
    "conv-dilated": one("Conv", f(3, 4, 2, 2), dilations=[2, 3], pads=[1, 2, 1, 1]),
    "conv-same-upper": one("Conv", f(3, 4, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv-same-lower": one("Conv", f(3, 4, 2, 4), auto_pad="SAME_LOWER", strides=[1, 3]),
    "conv-valid": one("Conv", f(3, 4, 2, 2), auto_pad="VALID"),
    "gemm": chain(
        ("Flatten", ["images"], ["v"], {}),
        ("Gemm", ["v", "w", "b"], ["y"], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        weights={"w": f(7, 120), "b": f(7)},
    ),
    "gemm-plain": chain(("Flatten", ["images"], ["v"], {}), ("Gemm", ["v", "w"], ["y"], {}), weights={"w": f(120, 7)}),
    "matmul": one("MatMul", f(6, 3)),
    "matmul-batched": one("MatMul", f(4, 6, 3)),
    "einsum": one("Einsum", f(6, 2), equation="bchw,wk->bckh", since=12),
    # pooling
    "maxpool": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "maxpool-odd": one("MaxPool", kernel_shape=[2, 3], pads=[0, 1, 1, 2], dilations=[2, 1], strides=[1, 2]),
    "maxpool-ceil": one("MaxPool", kernel_shape=[2, 3], strides=[2, 3], ceil_mode=1),
    "maxpool-ceil-drop": one("MaxPool", kernel_shape=[1, 1], strides=[3, 3], ceil_mode=1, shape=(2, 5, 5), since=20),
    "maxpool-same": one("MaxPool", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    "averagepool": one("AveragePool", kernel_shape=[2, 2], strides=[2, 1]),
    "averagepool-pads": one("AveragePool", kernel_shape=[3, 3], pads=[1, 0, 2, 1]),
    "averagepool-include": one("AveragePool", kernel_shape=[3, 3], pads=[1, 0, 2, 1], count_include_pad=1),
    "averagepool-ceil": one("AveragePool", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1),
    "averagepool-ceil-pads": one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1),
    "averagepool-ceil-include": one(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1, since=19
    ),
    "averagepool-same": one("AveragePool", kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
    "globalaveragepool": one("GlobalAveragePool"),
    "globalmaxpool": one("GlobalMaxPool"),
    # arithmetic
    "add": one("Add", f(4, 1, 6)),
    "sub": one("Sub", f(1, 5, 1)),
    "mul": one("Mul", f(4, 5, 6)),
    "div": one("Div", positive(6)),
    "div-whole": chain(
        ("Cast", ["images"], ["i"], {"to": INT64}), ("Div", ["i", "two"], ["y"], {}), weights={"two": ints(2)}, smooth=False
    ),
    "pow": one("Pow", np.float32(2.0)),
    "pow-whole": one("Pow", np.int64(3), since=12),
    "sqrt": both("Sqrt"),
    "log": both("Log"),
    "reciprocal": both("Reciprocal"),
    "exp": one("Exp"),
    "sin": one("Sin"),
    "cos": one("Cos"),
    "erf": one("Erf"),
    "neg": one("Neg"),
    "abs": one("Abs"),
    "min": one("Min", f(6), np.float32(0.4)),
    "max": one("Max", f(6), np.float32(-0.4)),
    "sum": one("Sum", f(6), f(4, 1, 1)),
    "mean": one("Mean", f(6), f(4, 1, 1)),
    "round": one("Round", smooth=False),
    "floor": one("Floor", smooth=False),
    "ceil": one("Ceil", smooth=False),
    "sign": one("Sign", smooth=False),
    # comparisons
    **{
        op.lower(): one(op, f(4, 5, 6), smooth=False, since=16 if "Or" in op else 9)
        for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    "equal": chain(
        ("Round", ["images"], ["r"], {}), ("Equal", ["r", "w"], ["y"], {}), weights={"w": np.float32(1)}, smooth=False
    ),
    "and-or-not": chain(
        ("Greater", ["images", "zero"], ["p"], {}),
        ("Less", ["images", "w"], ["q"], {}),
        ("And", ["p", "q"], ["r"], {}),
        ("Not", ["q"], ["s"], {}),
        ("Or", ["r", "s"], ["y"], {}),
        weights={"zero": np.float32(0), "w": f(4, 5, 6)},
        smooth=False,
    ),
    "where": chain(
        ("Greater", ["images", "w"], ["p"], {}), ("Where", ["p", "images", "w"], ["y"], {}), weights={"w": f(4, 5, 6)}
    ),
    "isnan-isinf": chain(
        ("Div", ["images", "zero"], ["i"], {}),
        ("IsInf", ["i"], ["p"], {"detect_negative": 0}),
        ("Sub", ["i", "i"], ["n"], {}),
        ("IsNaN", ["n"], ["q"], {}),
        ("And", ["p", "q"], ["y"], {}),
        weights={"zero": np.float32(0)},
        smooth=False,
    ),
    # activations
    "relu": one("Relu"),
    "clip": one("Clip", np.float32(-0.5), np.float32(1.5)),
    "clip-low": one("Clip", np.float32(-0.5)),
    "clip-high": one("Clip", None, np.float32(0.7)),
    "leakyrelu": one("LeakyRelu", alpha=0.2),
    "prelu": one("PRelu", f(4, 1, 1)),
    "elu": one("Elu", alpha=0.7),
    "selu": one("Selu"),
    "celu": one("Celu", alpha=0.7, since=12),
    "thresholdedrelu": one("ThresholdedRelu", alpha=0.3, since=10),
    "sigmoid": one("Sigmoid"),
    "hardsigmoid": one("HardSigmoid", alpha=0.17, beta=0.4),
    "hardswish": one("HardSwish", since=14),
    "swish": one("Swish", alpha=0.7, since=24),
    "mish": one("Mish", since=18),
    "gelu": one("Gelu", since=20),
    "gelu-tanh": one("Gelu", approximate="tanh", since=20),
    "silu": chain(("Sigmoid", ["images"], ["s"], {}), ("Mul", ["images", "s"], ["y"], {})),
    "softplus": one("Softplus"),
    "softsign": one("Softsign"),
    "tanh": one("Tanh"),
    # reductions
    **{
        f"reduce{kind.lower()}": one(f"Reduce{kind}", ints(2, -1), keepdims=keep, since=18)
        for kind, keep in (("Mean", 0), ("Sum", 1), ("Max", 0), ("Min", 1), ("L1", 0), ("L2", 1), ("SumSquare", 0))
    },
    "reduceprod": one("ReduceProd", ints(1, 2), keepdims=0, since=18),
    "reducelogsumexp": one("ReduceLogSumExp", ints(1), since=18),
    "reducelogsum": chain(
        ("Exp", ["images"], ["e"], {}), ("ReduceLogSum", ["e", "axes"], ["y"], {}), weights={"axes": ints(1)}, since=18
    ),
    "reducesum-nothing": one("ReduceSum", ints(), noop_with_empty_axes=1, since=13),
    "cumsum": one("CumSum", ints(2), since=11),
    "cumsum-back": one("CumSum", ints(-1), exclusive=1, reverse=1, since=11),
    "softmax": one("Softmax", axis=1),
    "softmax-last": one("Softmax", since=13),
    "logsoftmax": one("LogSoftmax", axis=-1),
    "argmax": one("ArgMax", axis=1, smooth=False),
    "argmin": one("ArgMin", axis=-1, keepdims=0, smooth=False),
    "argmax-last": chain(
        ("Round", ["images"], ["r"], {}), ("ArgMax", ["r"], ["y"], {"axis": 2, "select_last_index": 1}), smooth=False, since=12
    ),
    # normalisations
    "batchnormalization": one("BatchNormalization", f(4), f(4), f(4), positive(4), epsilon=1e-3),
    "instancenormalization": one("InstanceNormalization", f(4), f(4), epsilon=1e-3),
    "groupnormalization-18": one("GroupNormalization", f(2), f(2), num_groups=2, since=18, until=20),
    "groupnormalization-21": one("GroupNormalization", f(4), f(4), num_groups=2, epsilon=1e-3, since=21),
    "layernormalization": one("LayerNormalization", f(6), f(6), epsilon=1e-3, since=17),
    "layernormalization-axis": one("LayerNormalization", f(5, 6), axis=2, since=17),
    "lrn": one("LRN", size=3, alpha=0.2, beta=0.5, bias=1.5),
    "lpnormalization": one("LpNormalization", axis=1),
    "lpnormalization-1": one("LpNormalization", axis=-1, p=1),
    # shapes
    "flatten": one("Flatten", axis=1),
    "reshape": one("Reshape", ints(0, -1, 3)),
    "transpose": one("Transpose", perm=[0, 2, 3, 1]),
    "squeeze": one("Squeeze", ints(1), shape=(1, 5, 6), since=13),
    "unsqueeze": one("Unsqueeze", ints(-1, 1), since=13),
    "concat": chain(("Concat", ["images", "relu", "images"], ["y"], {"axis": -2})),
    "slice": one("Slice", ints(1, -3), ints(99, -1), ints(2, 3), ints(2, 1)),
    "slice-back": one("Slice", ints(-1, 3), ints(-99, 0), ints(1, 3), ints(-1, -2)),
    "slice-empty-axes": one("Slice", ints(0, 1), ints(9, 3)),
    "split": chain(
        ("Split", ["images", "sizes"], ["a", "b"], {"axis": 1}),
        ("Concat", ["b", "a"], ["y"], {"axis": 1}),
        weights={"sizes": ints(1, 3)},
        since=13,
    ),
    "split-parts": chain(
        ("Split", ["images"], ["a", "b", "c"], {"axis": 2, "num_outputs": 3}),
        ("Concat", ["b", "a", "c"], ["y"], {"axis": 2}),
        since=18,
    ),
    "gather": one("Gather", ints(3, -1, 0), axis=2),
    "gather-scalar": one("Gather", np.int64(-2), axis=1),
    "gather-table": one("Gather", np.array([[0, 2], [1, 1]]), axis=-1),
    "expand": one("Expand", ints(1, 4, 1, 1), shape=(1, 5, 6)),
    "expand-keeps": one("Expand", ints(4, 1, 6), shape=(4, 5, 1)),
    "tile": one("Tile", ints(1, 2, 1, 3)),
    "shape-graph": chain(
        ("Shape", ["images"], ["s"], {}),
        ("Gather", ["s", "zero"], ["n"], {"axis": 0}),
        ("Unsqueeze", ["n", "zero1"], ["n1"], {}),
        ("Concat", ["n1", "rest"], ["t"], {"axis": 0}),
        ("Reshape", ["images", "t"], ["y"], {}),
        weights={"zero": np.int64(0), "zero1": ints(0), "rest": ints(-1)},
        since=13,
    ),
    "shape-part-size": chain(
        ("Shape", ["images"], ["s"], {"start": 1, "end": -1}),
        ("Size", ["images"], ["n"], {}),
        ("Mul", ["s", "n"], ["m"], {}),
        ("ReduceSum", ["m"], ["t"], {"keepdims": 0}),
        ("Cast", ["t"], ["f"], {"to": FLOAT}),
        ("Mul", ["images", "f"], ["y"], {}),
        since=15,
    ),
    "constantofshape-range": chain(
        ("Shape", ["images"], ["s"], {}),
        ("ConstantOfShape", ["s"], ["c"], {"value": helper.make_tensor("v", FLOAT, [1], [1.5])}),
        ("Range", ["a", "b", "d"], ["r"], {}),
        ("Add", ["c", "r"], ["e"], {}),
        ("Mul", ["images", "e"], ["y"], {}),
        weights={"a": np.float32(0), "b": np.float32(3), "d": np.float32(0.5)},
        since=11,
    ),
    "depthtospace": one("DepthToSpace", blocksize=2),
    "depthtospace-crd": one("DepthToSpace", blocksize=2, mode="CRD", since=11),
    "spacetodepth": one("SpaceToDepth", blocksize=2, shape=(2, 4, 6)),
    "onehot": chain(
        ("ArgMax", ["images"], ["i"], {"axis": 1}),
        ("OneHot", ["i", "depth", "values"], ["y"], {"axis": -1}),
        weights={"depth": np.int64(4), "values": np.array([0.5, 2.0], np.float32)},
        smooth=False,
    ),
    "identity-dropout": chain(("Identity", ["images"], ["i"], {}), ("Dropout", ["i"], ["y"], {})),
    # padding and resizing
    "pad": one("Pad", ints(0, 1, 0, 2, 0, 0, 3, 1), np.float32(0.7)),
    "pad-crop": one("Pad", ints(0, 0, -1, 2, 0, 0, 1, -2)),
    "pad-axes": one("Pad", ints(1, 2), np.float32(0.5), ints(-1), since=18),
    "pad-reflect": one("Pad", ints(0, 0, 2, 1, 0, 0, 1, 3), mode="reflect"),
    "pad-edge": one("Pad", ints(0, 0, 2, 1, 0, 0, 1, 3), mode="edge"),
    "pad-wrap": one("Pad", ints(0, 0, 2, 1, 0, 0, 1, 3), mode="wrap", since=19),
    **{
        f"resize-nearest-{kind}-{nearest}": one(
            "Resize",
            None,
            np.array([1, 1, 1.7, 0.6], np.float32),
            mode="nearest",
            coordinate_transformation_mode=kind,
            nearest_mode=nearest,
        )
        for kind in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    },
    **{
        f"resize-linear-{kind}": one(
            "Resize", None, None, ints(1, 4, 9, 3), mode="linear", coordinate_transformation_mode=kind, since=11, batch=1
        )
        for kind in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    },
    "resize-axes": one("Resize", None, None, ints(10, 1), mode="linear", axes=[2, 3], since=18),
    # types and levels
    "cast": chain(("Cast", ["images"], ["i"], {"to": INT64}), ("Cast", ["i"], ["y"], {"to": FLOAT}), smooth=False),
    "cast-bool": one("Cast", to=BOOL, smooth=False),
    "cast-half": one("Cast", to=FLOAT16, smooth=False),
    "castlike": one("CastLike", np.int64(1), smooth=False, since=15),
    "quantizelinear": chain(
        ("QuantizeLinear", ["images", "s", "z"], ["q"], {}),
        ("DequantizeLinear", ["q", "s", "z"], ["y"], {}),
        weights={"s": np.float32(0.03), "z": np.int8(-9)},
        smooth=False,
    ),
    "constant": chain(
        ("Constant", [], ["c"], {"value_float": 1.5}),
        ("Constant", [], ["d"], {"value_ints": [0, -1]}),
        ("Mul", ["images", "c"], ["m"], {}),
        ("Reshape", ["m", "d"], ["y"], {}),
        since=12,
    ),
}
CASES["concat"] = chain(("Relu", ["images"], ["relu"], {}), ("Concat", ["images", "relu", "images"], ["y"], {"axis": -2}))

OPSETS = (18, 20)
NEWER = 24
LEGACY: dict[str, tuple[Case, int]] = {
    "softmax-9": (one("Softmax", axis=2), 9),
    "logsoftmax-11": (one("LogSoftmax"), 11),
    "clip-9": (one("Clip", min=-0.5, max=1.0), 9),
    "clip-9-open": (one("Clip"), 9),
    "pad-9": (one("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], value=0.5), 9),
    "squeeze-11": (one("Squeeze", axes=[1], shape=(1, 5, 6)), 11),
    "unsqueeze-11": (one("Unsqueeze", axes=[1, 3]), 11),
    "split-11": (
        chain(("Split", ["images"], ["a", "b"], {"axis": 1, "split": [1, 3]}), ("Concat", ["b", "a"], ["y"], {"axis": 1})),
        11,
    ),
    "reducemean-11": (one("ReduceMean", axes=[2, 3], keepdims=0), 11),
    "reducesum-11": (one("ReduceSum", axes=[-1]), 11),
    "reducemax-13": (one("ReduceMax", axes=[1]), 13),
    "dropout-9": (one("Dropout", ratio=0.4), 9),
    "batchnormalization-9": (one("BatchNormalization", f(4), f(4), f(4), positive(4), momentum=0.8), 9),
    "resize-13": (one("Resize", None, np.array([1, 1, 2, 2], np.float32), coordinate_transformation_mode="asymmetric"), 13),
}


def fits(case: Case, opset: int) -> bool:
    return case.since <= opset <= case.until


def compare(case: Case, opset: int) -> None:
    made = model(case, opset)
    x = images(case.shape, n=case.batch if isinstance(case.batch, int) else 3)
    want, module = by_runtime(made, x), imported(made)
    got = module(torch.from_numpy(x))
    assert got.dtype == torch.float32 and got.shape == want.shape
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "opset"), [(n, o) for n, c in CASES.items() for o in OPSETS if fits(c, o)])
def test_an_operator_computes_what_the_runtime_computes(name: str, opset: int) -> None:
    compare(CASES[name], opset)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if fits(c, NEWER)])
def test_an_operator_of_the_newest_opset(name: str) -> None:
    compare(CASES[name], NEWER)


@pytest.mark.parametrize("name", LEGACY)
def test_an_operator_as_older_opsets_wrote_it(name: str) -> None:
    compare(*LEGACY[name])


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.smooth])
def test_a_gradient_is_that_of_finite_differences(name: str) -> None:
    case = CASES[name]
    opset = next(o for o in (*OPSETS, 21, NEWER) if fits(case, o))
    made = model(case, opset)
    del made.graph.node[-2]  # the cast to float32 of the end
    made.graph.node[-1].input[0] = "y"
    module = imported(made).double()
    x = torch.from_numpy(images(case.shape, n=case.batch if isinstance(case.batch, int) else 2)).double().requires_grad_(True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True, eps=1e-6, atol=1e-5)


def test_every_operator_has_its_case() -> None:
    cases = [*CASES.values(), *(case for case, _ in LEGACY.values())]
    assert {node.op_type for case in cases for node in case.nodes} - {"Constant"} == set(OPERATORS)
