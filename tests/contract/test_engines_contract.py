"""What every engine promises, over the same small network: nobody can tell from the logits how a batch was cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkd.catalog import Shelf
from robustkd.engines.onnx_torch import OnnxTorchEngine
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.engines.rtx import RtxEngine
from robustkd.engines.trt import TrtEngine
from robustkd.errors import ArtifactError
from robustkd.exporting.to_onnx import to_onnx
from tests.fake_tensorrt import ADA, Fake, platform

SHAPE, CLASSES, N = (1, 28, 28), 10, 300


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    built: torch.nn.Module = Shelf("models").get("resnet18")(width=0.0625, stem_stride=2).build(channels=1, classes=CLASSES)
    with torch.no_grad():
        built.train()(torch.rand(64, *SHAPE))  # running statistics that are not those of a fresh net
    return built.train()  # left so on purpose: an engine evaluates in eval mode whatever it is given


@pytest.fixture(scope="module")
def files(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    told: dict[str, Any] = {"input_shape": SHAPE, "classes": [str(c) for c in range(CLASSES)]}
    return {
        "ort": to_onnx(net, folder / "free.onnx", **told),
        "ort-fixed": to_onnx(net, folder / "fixed.onnx", max_batch=1, **told),
    }


@pytest.fixture(scope="module")
def plans(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fake, Path]]:
    """Plans of a fake TensorRT: batches from 3 to 16, and from 1 to 64."""
    wanted: dict[str, Any] = {"trt": ("trt", "ort", (3, 4, 16)), "rtx": ("rtx", "ort", (1, 8, 64))}
    made = {}
    for name, (kind, file, sizes) in wanted.items():
        fake = Fake(kind, classes=CLASSES)
        plan = tmp_path_factory.mktemp(name) / "model.engine"
        plan.write_bytes(fake.plan(files[file].read_bytes(), sizes))
        made[name] = (fake, plan)
    return made


@pytest.fixture(
    scope="module", params=["pytorch", "ort", "ort-unoptimized", "ort-fixed", "onnx-torch", "onnx-torch-fixed", "trt", "rtx"]
)
def engine(
    request: pytest.FixtureRequest, net: torch.nn.Module, files: dict[str, Path], plans: dict[str, tuple[Fake, Path]]
) -> Iterator[Any]:
    makers: dict[str, Callable[[], Any]] = {
        "pytorch": lambda: PytorchEngine(net, input_shape=SHAPE, classes=CLASSES, chunk=64),
        "ort": lambda: OrtEngine(files["ort"], threads=1),
        "ort-unoptimized": lambda: OrtEngine(files["ort"], threads=1, optimize=False),
        "ort-fixed": lambda: OrtEngine(files["ort-fixed"], threads=1),
        "onnx-torch": lambda: OnnxTorchEngine(files["ort"]),
        "onnx-torch-fixed": lambda: OnnxTorchEngine(files["ort-fixed"]),
        "trt": lambda: TrtEngine(plans["trt"][1], trust=True, platform=platform(plans["trt"][0])),
        "rtx": lambda: RtxEngine(plans["rtx"][1], trust=True, platform=platform(plans["rtx"][0], ADA)),
    }
    with makers[request.param]() as made:
        yield made


@pytest.fixture(scope="module")
def x() -> Any:
    return np.random.default_rng(0).random((N, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def whole(engine: Any, x: Any) -> Any:
    return engine.logits(x)


def test_shape_type_and_info(engine: Any, whole: Any) -> None:
    assert whole.shape == (N, CLASSES) and whole.dtype == np.float32 and np.isfinite(whole).all()
    assert (engine.info.input_shape, engine.info.classes) == (SHAPE, CLASSES)
    assert engine.info.runtime and engine.info.runtime_version and engine.info.device
    fake = "fake" in engine.info.runtime
    assert engine.info.settings["batch"] if fake else (engine.info.device == "cpu" and engine.info.settings["threads"] >= 1)


def test_engines_compute_the_network(net: torch.nn.Module, whole: Any, x: Any) -> None:
    import copy

    with torch.no_grad():
        want = copy.deepcopy(net).eval()(torch.tensor(x)).numpy()
    assert np.ptp(want, axis=0).max() > 0.01  # the images matter
    np.testing.assert_allclose(whole, want, atol=1e-5)


@given(cut=st.lists(st.integers(0, 90), min_size=1, max_size=4))
def test_the_cut_of_a_batch_does_not_matter(engine: Any, whole: Any, x: Any, cut: list[int]) -> None:
    start = 0
    for size in cut:
        part = engine.logits(x[start : start + size])
        assert part.shape == (len(x[start : start + size]), CLASSES)
        np.testing.assert_allclose(part, whole[start : start + size], atol=1e-5)
        start += size


@pytest.mark.parametrize("n", [1, 7])
def test_small_batches(engine: Any, whole: Any, x: Any, n: int) -> None:
    np.testing.assert_allclose(engine.logits(x[:n]), whole[:n], atol=1e-5)


def test_no_images_give_no_logits(engine: Any) -> None:
    out = engine.logits(np.empty((0, *SHAPE), np.float32))
    assert out.shape == (0, CLASSES) and out.dtype == np.float32


def test_output_is_fresh_and_input_untouched(engine: Any, whole: Any, x: Any) -> None:
    before = x[:5].copy()
    first = engine.logits(x[:5])
    first[:] = 1e9
    second = engine.logits(x[:5])
    np.testing.assert_allclose(second, whole[:5], atol=1e-5)
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(x[:5], before)


def test_views_and_read_only_arrays(engine: Any, whole: Any, x: Any) -> None:
    view = x[::-2]
    view.flags.writeable = False
    np.testing.assert_allclose(engine.logits(view), whole[::-2], atol=1e-5)
    one = x[:1][::-1]  # numpy calls it contiguous though its first stride is negative
    np.testing.assert_allclose(engine.logits(one), whole[:1], atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 27, 28), (1, 28, 28), (2, 784), (0, 3, 28, 28)])
def test_wrong_shape_is_an_error(engine: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="images have shape"):
        engine.logits(np.zeros(shape, np.float32))


@pytest.mark.parametrize("kind", [np.float64, np.uint8, np.float16])
def test_wrong_type_is_an_error(engine: Any, kind: Any) -> None:
    with pytest.raises(ArtifactError, match="float32"):
        engine.logits(np.zeros((2, *SHAPE), kind))


def test_modes_of_the_network_are_left_alone(engine: Any, net: torch.nn.Module, x: Any) -> None:
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    engine.logits(x[:3])
    assert all(module.training for module in net.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
