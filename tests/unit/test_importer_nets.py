"""Whole networks, exported and imported again: the runtime's logits, the network's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustkd.catalog import Shelf
from robustkd.engines.importer.load import import_onnx
from robustkd.engines.ort import OrtEngine
from robustkd.exporting.to_onnx import to_onnx
from tests.unit.importer_graphs import Case, by_runtime, images, imported, model, one

CLASSES = 10


def alive(net: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Running statistics and biases that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
    return net.eval()


def exported(net: nn.Module, file: Path, shape: tuple[int, int, int], classes: int = CLASSES, **more: Any) -> Path:
    return to_onnx(net, file, input_shape=shape, classes=[str(c) for c in range(classes)], **more)


def check(net: nn.Module, file: Path, shape: tuple[int, int, int], *, n: int = 8) -> None:
    """Imported = runtime = network, and the gradient of the input is the network's; tolerances relative to the range."""
    module = import_onnx(file)
    x = np.random.default_rng(1).random((n, *shape), dtype=np.float32)
    with torch.no_grad():
        got, own = (part(torch.from_numpy(x)) for part in (module, net))
    unit = max(float(np.ptp(own.numpy())), 1e-3)
    runtime = OrtEngine(file, threads=1, optimize=False).logits(x)
    np.testing.assert_allclose(got.numpy(), runtime, atol=2e-6 * max(1.0, 5 * unit), rtol=0)
    np.testing.assert_allclose(got.numpy(), own.numpy(), atol=1e-5 * max(1.0, unit), rtol=0)
    # in float64, for rounding decides on which side of its corner an activation is; of any sum of logits, for the cross
    # entropy of a random network may be saturated
    ways = torch.randn(own.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    of_import, of_net = (_gradient(part, x, ways) for part in (module.double(), copy.deepcopy(net).double()))
    size = of_net.abs().amax()
    assert size > 0
    torch.testing.assert_close(of_import / size, of_net / size, atol=1e-4, rtol=0)
    assert not any(p.requires_grad for p in module.parameters())


def _gradient(net: nn.Module, x: Any, ways: torch.Tensor) -> torch.Tensor:
    leaf = torch.from_numpy(x).double().requires_grad_(True)
    (grad,) = torch.autograd.grad((net(leaf) * ways).sum(), leaf)
    return grad


OURS = ("resnet18", "mobilenet-v2")
TEACHERS = (
    "cifar-resnet",
    "deepmind-preact-resnet",
    "deepmind-wrn",
    "hypersphere-wrn",
    "preact-resnet",
    "resnet34",
    "resnet50",
    "wide-resnet",
)
NARROW = {"width": 0.125}


def narrow(name: str) -> nn.Module:
    """A network of the shelf as narrow as it can be told to be."""
    config = Shelf("models").get(name)
    known = config.model_fields
    knobs: dict[str, Any] = {}
    if "width" in known:
        knobs["width"] = 0.125 if known["width"].annotation is float else 1
    if "depth" in known and name in ("wide-resnet", "deepmind-wrn", "hypersphere-wrn"):
        knobs["depth"] = 10
    torch.manual_seed(0)
    net: nn.Module = config(**knobs).build(channels=3, classes=CLASSES)
    return net


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A narrow ResNet-18 and its export, for all tests that only need some network."""
    net = alive(narrow("resnet18"), (3, 32, 32))
    return net, exported(net, tmp_path_factory.mktemp("student") / "student.onnx", (3, 32, 32))


def test_a_resnet(student: tuple[nn.Module, Path]) -> None:
    net, file = student
    check(net, file, (3, 32, 32))


def test_a_mobilenet(tmp_path: Path) -> None:
    net = alive(narrow("mobilenet-v2"), (3, 32, 32))
    check(net, exported(net, tmp_path / "net.onnx", (3, 32, 32), opset=18), (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher(name: str, tmp_path: Path) -> None:
    net = alive(narrow(name), (3, 32, 32))
    check(net, exported(net, tmp_path / "net.onnx", (3, 32, 32)), (3, 32, 32), n=4)


def test_a_copy_runs_and_leaves_the_first_alone(student: tuple[nn.Module, Path]) -> None:
    first = import_onnx(student[1])
    second, x = copy.deepcopy(first), torch.rand(2, 3, 32, 32)
    second.rounding = "exact"
    assert first.rounding == "masked"
    torch.testing.assert_close(first(x), second(x))
    torch.testing.assert_close(first.double()(x.double()).float(), second(x), atol=1e-5, rtol=0)


# --- quantised by ONNX Runtime ---------------------------------------------------------------------------------------


class _Reader:
    """Images for calibration, as the quantiser reads them."""

    def __init__(self, x: Any) -> None:
        self._rows = iter(x)

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._rows, None)
        return None if row is None else {"images": row[None]}


def quantized(file: Path, out: Path, x: Any, *, tensorrt: bool) -> Path:
    """Static QDQ as for TensorRT (symmetric, float bias, convolutions only), or ONNX Runtime's own asymmetric uint8."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    kind = QuantType.QInt8 if tensorrt else QuantType.QUInt8
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    extra = {**symmetric, "OpTypesToExcludeOutputQuantization": ["Conv"]} if tensorrt else {}
    quantize_static(
        str(file),
        str(out),
        _Reader(x),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"] if tensorrt else None,
        extra_options=extra,
    )
    return out


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime"])
def levels(request: pytest.FixtureRequest, student: tuple[nn.Module, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("levels") / f"{request.param}.onnx"
    x = np.random.default_rng(2).random((8, 3, 32, 32), dtype=np.float32)
    return quantized(student[1], out, x, tensorrt=request.param == "tensorrt")


def test_levels_give_the_runtimes_classes(levels: Path) -> None:
    x = np.random.default_rng(3).random((64, 3, 32, 32), dtype=np.float32)
    want = OrtEngine(levels, threads=1, optimize=False).logits(x)
    got = import_onnx(levels)(torch.from_numpy(x)).numpy()
    unit = np.ptp(want)
    assert np.abs(got - want).max() <= 0.05 * unit  # one or two levels, where a sum lies on a tie
    top = np.sort(want, axis=1)
    clear = top[:, -1] - top[:, -2] > 2 * np.abs(got - want).max()
    assert clear.mean() > 0.5 and (got.argmax(1) == want.argmax(1))[clear].all()
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.95


@pytest.mark.parametrize("rounding", ["masked", "pass-through"])
def test_a_gradient_passes_the_levels(rounding: Any, levels: Path, student: tuple[nn.Module, Path]) -> None:
    module = import_onnx(levels, rounding=rounding)
    z = torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    (through,) = torch.autograd.grad(module(z)[:, 0].sum(), z)
    (plain,) = torch.autograd.grad(student[0](z)[:, 0].sum(), z)
    assert (through.flatten(1).abs().amax(1) > 0).float().mean() > 0.99
    cosine = nn.functional.cosine_similarity(through.flatten(1), plain.flatten(1))
    # points where the network it was made from points; where a ReLU became the lower end of uint8, passing the saturation
    # means passing the ReLU, which is why that is not the default
    assert cosine.mean() > (0.8 if rounding == "masked" or "tensorrt" in levels.name else 0.2)


def test_the_exact_derivative_of_levels_is_zero_everywhere(levels: Path) -> None:
    """The documented negative: an attack that follows it finds nothing and reports robustness."""
    module = import_onnx(levels, rounding="exact")
    z = torch.rand(32, 3, 32, 32).requires_grad_(True)
    (grad,) = torch.autograd.grad(module(z)[:, 0].sum(), z)
    assert (grad == 0).all()


# --- random networks --------------------------------------------------------------------------------------------------

_rng = np.random.default_rng(11)


def _conv(channels: int, groups: int) -> Callable[[str, str], tuple[list[Any], dict[str, Any]]]:
    def build(before: str, after: str) -> tuple[list[Any], dict[str, Any]]:
        weight = (_rng.normal(size=(channels, channels // groups, 3, 3)) * 0.3).astype(np.float32)
        case = one("Conv", weight, pads=[1, 1, 1, 1], group=groups)
        case.nodes[0].input[:], case.nodes[0].output[:] = [before, f"w_{after}"], [after]
        case.nodes[0].name = after
        return case.nodes, {f"w_{after}": weight}

    return build


def _plain(op: str, **attributes: Any) -> Callable[[str, str], tuple[list[Any], dict[str, Any]]]:
    def build(before: str, after: str) -> tuple[list[Any], dict[str, Any]]:
        case = one(op, **attributes)
        case.nodes[0].input[:], case.nodes[0].output[:] = [before], [after]
        case.nodes[0].name = after
        return case.nodes, {}

    return build


LAYERS = {
    "conv": _conv(4, 1),
    "depthwise": _conv(4, 4),
    "relu": _plain("Relu"),
    "leaky": _plain("LeakyRelu"),
    "sigmoid": _plain("Sigmoid"),
    "hardswish": _plain("HardSwish"),
    "max": _plain("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "average": _plain("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "softmax": _plain("Softmax", axis=1),
    "transpose": _plain("Transpose", perm=[0, 1, 3, 2]),
}


@settings(max_examples=25)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([18, 20]))
def test_any_chain_of_layers(layers: list[str], seed: int, opset: int) -> None:
    nodes, weights = [], {}
    names = ["images", *(f"v{i}" for i in range(1, len(layers))), "y"]
    for layer, before, after in zip(layers, names[:-1], names[1:], strict=True):
        made, held = LAYERS[layer](before, after)
        nodes, weights = [*nodes, *made], {**weights, **held}
    case = Case(nodes, weights, shape=(4, 5, 5))
    x = images(case.shape, n=2, seed=seed)
    graph = model(case, opset)
    np.testing.assert_allclose(imported(graph)(torch.from_numpy(x)).numpy(), by_runtime(graph, x), rtol=1e-4, atol=1e-5)


# --- networks of libraries ----------------------------------------------------------------------------------------------

#: of each library the two that are tried every time, and the rest
VISION = (
    ("mobilenet_v3_small", "resnet18"),
    (
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "mnasnet0_5",
        "mobilenet_v2",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
        "squeezenet1_0",
    ),
)
TIMM = (
    ("mobilenetv3_small_050", "resnet10t"),
    (
        "convnext_atto",
        "densenet121",
        "edgenext_xx_small",
        "efficientnet_lite0",
        "ghostnet_050",
        "mixnet_s",
        "mobilenetv2_050",
        "mobilenetv4_conv_small",
        "regnetx_002",
        "repvgg_a0",
        "resnet18",
        "tf_efficientnet_b0",
    ),
)


def some(names: tuple[tuple[str, ...], tuple[str, ...]]) -> list[Any]:
    quick, slow = names
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("name", some(VISION))
def test_a_network_of_torchvision(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    net = alive(getattr(models, name)(weights=None, num_classes=CLASSES, **more), (3, 64, 64))
    check(net, exported(net, tmp_path / "net.onnx", (3, 64, 64), max_batch=64), (3, 64, 64), n=2)


@pytest.mark.parametrize("name", some(TIMM))
def test_a_network_of_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'robustkd[timm]'")
    torch.manual_seed(0)
    net = alive(timm.create_model(name, pretrained=False, num_classes=CLASSES), (3, 64, 64))
    check(net, exported(net, tmp_path / "net.onnx", (3, 64, 64), max_batch=64), (3, 64, 64), n=2)
