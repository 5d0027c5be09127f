from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from robustkd.catalog import Shelf
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import ArtifactError, RequirementError
from robustkd.exporting.parity import check, compare
from robustkd.exporting.to_onnx import to_onnx

CLASSES = ["tee \N{SNOWMAN}", "trouser"]


class Tiny(nn.Module):
    """Enough for the exporter: batch norm, dropout, pooling, a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))
        return out


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    tiny = Tiny().train()
    with torch.no_grad():
        tiny(torch.rand(64, 1, 8, 8))
    tiny.drop.eval()  # a mixture of modes, to be left as it is
    return tiny


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {"architecture": "tiny", "precision": "fp32", "source": "sha256:0", "threat": '{"norm":"linf"}'}
    return to_onnx(
        net,
        tmp_path_factory.mktemp("onnx") / "model.onnx",
        input_shape=(1, 8, 8),
        classes=CLASSES,
        max_batch=64,
        metadata=metadata,
    )


def test_graph_is_valid_and_its_interface_is_ours(file: Path) -> None:
    model = onnx.load(str(file))
    onnx.checker.check_model(model, full_check=True)
    given, out = model.graph.input[0], model.graph.output[0]
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 1, 8, 8]
    assert [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim] == ["batch", 2]
    assert (given.name, out.name) == ("images", "logits")
    assert {o.version for o in model.opset_import if not o.domain} == {20}
    assert not {"Softmax", "Dropout", "BatchNormalization"} & {node.op_type for node in model.graph.node}


def test_it_is_one_file_that_holds_its_weights(file: Path) -> None:
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    model = onnx.load(str(file), load_external_data=False)
    assert all(w.data_location != onnx.TensorProto.EXTERNAL for w in model.graph.initializer)


def test_metadata_tells_what_it_is(file: Path) -> None:
    metadata = OrtEngine(file).metadata
    assert metadata["robustkd.architecture"] == "tiny"
    assert json.loads(metadata["robustkd.classes"]) == CLASSES
    assert json.loads(metadata["robustkd.input_range"]) == [0, 1]
    assert json.loads(metadata["robustkd.input_shape"]) == [1, 8, 8]
    assert {"robustkd.threat", "robustkd.precision", "robustkd.source", "robustkd.version"} <= set(metadata)
    assert OrtEngine(file).info.max_batch == 64


def test_nothing_of_this_machine_is_inside(file: Path) -> None:
    data = file.read_bytes()
    for trace in (str(Path(__file__).parent), str(Path(torch.__file__).parent), "site-packages", "stack_trace", "forward"):
        assert trace.encode() not in data


@pytest.mark.parametrize("n", [1, 7])
def test_it_computes_the_network_in_eval_mode(net: nn.Module, file: Path, n: int) -> None:
    x = np.random.default_rng(0).random((n, 1, 8, 8), dtype=np.float32)
    raw = OrtEngine(file)._session.run(None, {"images": x})[0]  # in one piece, not cut by the engine
    source = PytorchEngine(net, input_shape=(1, 8, 8), classes=2)
    np.testing.assert_allclose(raw, source.logits(x), atol=1e-6)
    train = Tiny()
    train.load_state_dict(net.state_dict())
    assert np.abs(train.train()(torch.tensor(x)).detach().numpy() - raw).max() > 1e-3  # train mode would differ


def test_training_flags_are_left_as_they_were(net: nn.Module, file: Path) -> None:
    assert file.is_file()
    assert {name: module.training for name, module in net.named_modules()} == {
        "": True,
        "conv": True,
        "bn": True,
        "drop": False,
        "linear": True,
    }


def test_the_same_network_gives_the_same_bytes(net: nn.Module, tmp_path: Path) -> None:
    first, second = (
        to_onnx(net, tmp_path / name, input_shape=(1, 8, 8), classes=CLASSES, opset=18).read_bytes() for name in ("a", "b")
    )
    assert first == second


def test_it_says_nothing(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from robustkd.exporting.to_onnx import to_onnx; from tests.unit.test_to_onnx import Tiny\n"
        f"to_onnx(Tiny(), Path({str(tmp_path / 'm.onnx')!r}), input_shape=(1, 8, 8), classes='ab')"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_the_exporter_says_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    import warnings

    from robustkd.exporting.to_onnx import _quiet

    with caplog.at_level(logging.DEBUG, "robustkd"), _quiet():
        print("a line")
        warnings.warn("a warning", stacklevel=1)
    assert "exporter: a line" in caplog.text and "exporter warned: a warning" in caplog.text


class Branchy(nn.Module):
    """Control flow on values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x.flatten(1))
        return out * 2 if bool(out.sum() > 0) else out


def test_a_network_that_cannot_be_exported_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match="cannot export Branchy at opset 20") as caught:
        to_onnx(Branchy(), tmp_path / "m.onnx", input_shape=(1, 8, 8), classes=CLASSES)
    assert caught.value.where and caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_missing_onnxscript_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RequirementError) as caught:
        to_onnx(Tiny(), tmp_path / "m.onnx", input_shape=(1, 8, 8), classes=CLASSES)
    assert "robustkd[train]" in caught.value.fix


def test_a_place_that_cannot_be_written(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write m\.onnx"):
        to_onnx(net, tmp_path / "gone" / "m.onnx", input_shape=(1, 8, 8), classes=CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2"])
def test_full_size_students(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Shelf("models").get(name)().build(channels=3, classes=10)
    told: Any = {"input_shape": (3, 32, 32), "classes": [str(c) for c in range(10)]}
    engine = OrtEngine(to_onnx(net, tmp_path / "m.onnx", **told))
    x = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
    parity = check(compare(PytorchEngine(net, input_shape=(3, 32, 32), classes=10), engine, x, batches=(1, 7)))
    assert parity.agreement == 1
