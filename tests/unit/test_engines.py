from __future__ import annotations

import builtins
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from robustkd.bundle import create
from robustkd.catalog import Shelf
from robustkd.engines._open import open_engine
from robustkd.engines.ort import OrtEngine
from robustkd.errors import ArtifactError, NumericsError, RequirementError
from tests.unit.onnx_graphs import CLASSES, SHAPE, finish, half_inside, images, linear, quantized, save


def test_logits_are_the_graphs_own(tmp_path: Path) -> None:
    model = linear()
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    x = images(9)
    with OrtEngine(save(model, tmp_path)) as engine:
        np.testing.assert_allclose(engine.logits(x), x.reshape(9, -1) @ weight, rtol=1e-5, atol=1e-5)


def test_info_says_what_ran(tmp_path: Path) -> None:
    import onnxruntime

    info = OrtEngine(save(linear(max_batch="64"), tmp_path), threads=1, optimize=False).info
    assert (info.runtime, info.runtime_version) == ("onnxruntime", onnxruntime.__version__)
    assert (info.input_shape, info.classes, info.max_batch, info.device) == (SHAPE, CLASSES, 64, "cpu")
    assert info.settings == {"provider": "CPUExecutionProvider", "threads": 1, "graph_optimization": "none"}


def test_threads_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(linear(), tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert OrtEngine(file).info.settings["threads"] == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert OrtEngine(file).info.settings["threads"] >= 1


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        (linear(), "fp32"),
        (half_inside(), "fp16"),
        (quantized(), "int8"),
        (linear(precision="int8-fp16"), "int8-fp16"),
    ],
)
def test_precision_is_stated_or_detected(model: Any, precision: str, tmp_path: Path) -> None:
    engine = OrtEngine(save(model, tmp_path))
    assert engine.info.precision == precision
    assert engine.logits(images(3)).dtype == np.float32


def test_metadata_is_read(tmp_path: Path) -> None:
    assert OrtEngine(save(linear(architecture="resnet18"), tmp_path)).metadata == {"robustkd.architecture": "resnet18"}


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7])
def test_a_fixed_batch_is_split_and_filled_up(n: int, tmp_path: Path) -> None:
    fixed = OrtEngine(save(linear(batch=4), tmp_path, "fixed.onnx"))
    free = OrtEngine(save(linear(), tmp_path, "free.onnx"))
    assert fixed.info.max_batch == 4 and free.info.max_batch is None
    np.testing.assert_allclose(fixed.logits(images(n)), free.logits(images(n)), rtol=1e-6)


def test_batches_stay_within_what_the_file_promises(tmp_path: Path) -> None:
    engine = OrtEngine(save(linear(max_batch="3"), tmp_path))
    sizes: list[int] = []
    run = engine._run
    engine._run = lambda x: (sizes.append(len(x)), run(x))[1]  # type: ignore[method-assign,func-returns-value]
    engine.logits(images(8))
    assert sizes == [3, 3, 2]


def _two_inputs() -> onnx.ModelProto:
    model = linear()
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    return model


def _map_output() -> onnx.ModelProto:
    return finish([helper.make_node("Relu", ["images"], ["logits"])], ["batch", *SHAPE], TensorProto.FLOAT, [])


def _class_output() -> onnx.ModelProto:
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("ArgMax", ["flat"], ["logits"], axis=1)]
    model = finish(nodes, ["batch", *SHAPE], TensorProto.FLOAT, [])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def _does_not_run() -> onnx.ModelProto:
    """An exporter's frozen batch behind a free one: the reshape takes no single image."""
    sizes = onnx.numpy_helper.from_array(np.array([3, 25]), "sizes")
    return finish([helper.make_node("Reshape", ["images", "sizes"], ["logits"])], ["batch", *SHAPE], TensorProto.FLOAT, [sizes])


def test_a_graph_of_contradicting_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Incompatible dimensions"):
        OrtEngine(save(linear(shape=(2, 5, 4)), tmp_path))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (_two_inputs(), "2 inputs"),
        (linear(shape=(50,)), "shape ['batch', 50]"),
        (linear(batch=1 << 30), "larger than any batch"),
        (linear(shape=(2, "h", 5)), "shape ['batch', 2, 'h', 5]"),
        (linear(kind=TensorProto.FLOAT16), "tensor(float16)"),
        (_map_output(), "float32 of shape (1, 2, 5, 5)"),
        (_class_output(), "int64"),
        (_does_not_run(), "does not run"),
    ],
)
def test_what_is_no_classifier_is_refused(model: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not an image classifier") as caught:
        OrtEngine(save(model, tmp_path))
    assert says in caught.value.what
    assert caught.value.exit_code == 5 and caught.value.fix


@pytest.mark.parametrize("data", [b"", b"hello world, this is no graph", b"\x08", b"\x00" * 64, b"PK\x03\x04zip"])
def test_foreign_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a usable ONNX file"):
        OrtEngine(file)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    file = tmp_path / "model.onnx"
    # the end of the file holds the opset, without which nothing loads: no proper prefix is a model
    for cut in sorted({*range(0, len(whole), 37), len(whole) - 1}):
        file.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError):
            OrtEngine(file)


@given(st.integers(0, 2**32))
def test_random_damage_never_escapes_as_another_error(seed: int) -> None:
    import tempfile

    rng = random.Random(seed)
    data = bytearray(linear().SerializeToString())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(bytes(data))
        try:
            engine = OrtEngine(file)
            out = engine.logits(images(2, engine.info.input_shape))
        except (ArtifactError, NumericsError):
            return
        assert out.shape == (2, engine.info.classes)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read gone\.onnx"):
        OrtEngine(tmp_path / "gone.onnx")


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_missing_package_names_the_install_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(linear(), tmp_path)
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RequirementError) as caught:
        OrtEngine(file)
    assert caught.value.exit_code == 4 and f"pip install {package}" in caught.value.fix


class TestOpen:
    def test_onnx(self, tmp_path: Path) -> None:
        with open_engine(save(linear(), tmp_path), threads=1) as engine:
            assert engine.info.runtime == "onnxruntime" and engine.info.settings["threads"] == 1

    @pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model", "manifest.json"])
    def test_anything_else_names_what_is_accepted(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(ArtifactError) as caught:
            open_engine(tmp_path / name)
        assert ".onnx" in caught.value.fix

    def test_missing_file_and_bare_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="cannot read"):
            open_engine(tmp_path / "gone.onnx")
        with pytest.raises(ArtifactError, match="not a bundle"):
            open_engine(tmp_path)

    def test_bundle_is_checked_first(self, tmp_path: Path) -> None:
        with create(tmp_path / "b", "onnx") as (folder, _):
            save(linear(), folder)
        with open_engine(tmp_path / "b") as engine:
            assert engine.info.classes == CLASSES
        file = tmp_path / "b" / "model.onnx"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="digest differs"):
            open_engine(tmp_path / "b")

    @pytest.mark.parametrize(
        ("kind", "says"),
        [("checkpoint", "is not an engine"), ("audit", "is not an engine"), ("engine", "holds no .engine file")],
    )
    def test_bundles_of_other_kinds(self, kind: Any, says: str, tmp_path: Path) -> None:
        with create(tmp_path / "b", kind):
            pass
        with pytest.raises(ArtifactError, match=says):
            open_engine(tmp_path / "b")


def test_shelf_lists_the_engines_with_a_summary() -> None:
    shelf = Shelf("engines")
    assert {"ort", "pytorch", "rtx", "trt"} <= set(shelf.names())
    assert all(shelf.get(name).summary for name in shelf.names())
