"""Both students in fp32, fp16 and int8 through the real TensorRT-RTX builder, for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from robustkd.engines._plan import parse_header
from robustkd.errors import RequirementError
from robustkd.exporting.graphs import inferred
from robustkd.exporting.half import to_half
from robustkd.exporting.int8 import quantize, tensors
from robustkd.exporting.ranges import measure
from robustkd.exporting.trt.bundle import build_bundle, engine_target
from robustkd.recipe.target import Calibration
from tests.fake_tensorrt import rtx_installed

torch = pytest.importorskip("torch", reason="needs the train extra")
pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(not rtx_installed(), reason="TensorRT-RTX is not installed: pip install 'robustkd[rtx]'"),
]

SHAPE = (3, 32, 32)
SMALL: dict[str, dict[str, Any]] = {"resnet18": {"width": 0.125, "stem_stride": 2}, "mobilenet-v2": {"width": 0.25}}
GPUS = ("sm86", "sm89", "sm120")


@pytest.fixture(scope="module", params=SMALL)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One student as ONNX in each precision; its weights are random and its batch statistics those of random images."""
    from robustkd.catalog import Shelf
    from robustkd.exporting.to_onnx import to_onnx

    torch.manual_seed(0)
    net = Shelf("models").get(request.param).model_validate({"name": request.param, **SMALL[request.param]})
    built = net.build(channels=3, classes=10).train()
    images = np.random.default_rng(0).random((16, *SHAPE), dtype=np.float32)
    with torch.no_grad():
        built(torch.from_numpy(images))
    folder = tmp_path_factory.mktemp(request.param)
    told: dict[str, Any] = {"input_shape": SHAPE, "classes": [str(c) for c in range(10)]}
    files = {"fp32": to_onnx(built, folder / "fp32.onnx", **told)}
    model = inferred(onnx.load(files["fp32"]))
    ranges = measure(model, images, Calibration(method="minmax"), tensors(model, "trt"))
    whole = quantize(model, ranges, "trt")
    lower = {"fp16": to_half(model), "int8": whole, "int8-fp16": to_half(whole)}
    for precision, made in lower.items():
        files[precision] = folder / f"{precision}.onnx"
        onnx.save(made, files[precision])
    return files


def test_every_precision_builds_for_every_gpu(graphs: dict[str, Path], tmp_path: Path) -> None:
    sizes = {}
    for precision, file in graphs.items():
        target = engine_target("rtx", precision, batch="1:8:64", engine={"capabilities": GPUS})
        bundle = build_bundle(file, target, tmp_path)
        facts = (bundle.manifest.model_extra or {})["engine"]
        header = parse_header(bundle.file(".engine").read_bytes())
        assert header is not None and header.targets == GPUS == tuple(facts["capabilities"])
        assert facts["batch"] == [1, 8, 64] and bundle.manifest.precision == precision
        assert bundle.manifest.model is not None and bundle.manifest.model.input_shape == SHAPE
        sizes[precision] = bundle.file(".engine").stat().st_size
    assert sizes["fp16"] < sizes["fp32"], "the builder kept the weights in the precision of the graph"


def test_turing_takes_half_and_no_float(graphs: dict[str, Path], tmp_path: Path) -> None:
    engine = {"capabilities": ("sm75",)}
    assert build_bundle(graphs["fp16"], engine_target("rtx", "fp16", engine=engine), tmp_path).manifest.kind == "engine"
    with pytest.raises(RequirementError, match="Turing"):
        build_bundle(graphs["fp32"], engine_target("rtx", "fp32", engine=engine), tmp_path)
