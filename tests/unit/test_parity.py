"""The gate must let the right network through and stop every wrong one that is like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from robustkd.catalog import Shelf
from robustkd.engines._base import EngineInfo
from robustkd.engines.ort import OrtEngine
from robustkd.engines.pytorch import PytorchEngine
from robustkd.errors import NumericsError
from robustkd.exporting.parity import Gate, Parity, check, compare
from robustkd.exporting.to_onnx import to_onnx

SHAPE, CLASSES = (3, 32, 32), 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class Table:
    """An engine that looks its logits up by the first pixel: any logits we like."""

    def __init__(self, logits: Any) -> None:
        self.table = np.asarray(logits, np.float32)
        self.info = EngineInfo(
            runtime="table",
            runtime_version="0",
            precision="fp32",
            device="cpu",
            input_shape=(1, 1, 1),
            classes=self.table.shape[1],
        )

    def logits(self, x: Any) -> Any:
        return self.table[x[:, 0, 0, 0].astype(int)]

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def judged(want: Any, got: Any, **more: Any) -> Parity:
    index = np.arange(len(want), dtype=np.float32).reshape(-1, 1, 1, 1)
    return compare(Table(want), Table(got), index, **more)


class TestFigures:
    def test_equal(self) -> None:
        logits = [[0.0, 5.0], [3.0, 1.0]]
        parity = judged(logits, logits)
        assert (parity.n, parity.max_abs, parity.mean_abs, parity.would_pass_at) == (2, 0, 0, 0)
        assert (parity.agreement, parity.flips, parity.logit_range, parity.ok) == (1, 0, 5, True)
        assert parity.tolerance == pytest.approx(5e-4)

    @pytest.mark.parametrize(("off", "ok"), [(4.9e-4, True), (5.1e-4, False)])
    def test_the_bound_is_a_share_of_the_range(self, off: float, ok: bool) -> None:
        parity = judged([[0.0, 5.0], [3.0, 1.0]], [[0.0, 5.0 + off], [3.0, 1.0]])
        assert parity.ok is ok
        assert parity.max_abs == pytest.approx(off, rel=1e-2)
        assert parity.would_pass_at == pytest.approx(off / 5, rel=1e-2)
        assert parity.mean_abs == pytest.approx(off / 4, rel=1e-2)

    def test_a_small_range_is_held_as_tightly(self) -> None:
        assert not judged([[0.0, 0.01]], [[0.0, 0.01 + 2e-6]]).ok

    def test_constant_logits_leave_room_for_rounding_only(self) -> None:
        assert judged([[7.0, 7.0]], [[7.0, 7.000001]]).ok
        assert not judged([[7.0, 7.0]], [[7.0, 7.0001]]).ok

    def test_zero_logits_allow_nothing(self) -> None:
        assert judged([[0.0, 0.0]], [[0.0, 0.0]]).ok
        with pytest.raises(NumericsError, match="would pass at no relative tolerance"):
            check(judged([[0.0, 0.0]], [[0.0, 1e-6]]))

    def test_flips_inside_and_outside_the_margin(self) -> None:
        want = [[1.0, 1.0001], [5.0, 0.0]]
        parity = judged(want, [[1.0002, 1.0], [0.0, 5.0]])
        assert (parity.flips, parity.flips_outside_margin, parity.agreement) == (2, 1, 0)

    def test_each_bound_of_a_gate_stops_alone(self) -> None:
        want = np.eye(8) * 10
        gate = Gate(relative=0.2, agreement=0.8, mean=0.05, margin=0.1)
        one = want.copy()
        one[0, 1] += 1.9
        assert judged(want, one, gate=gate).ok and not judged(want, one + 0.6, gate=gate).ok  # the mean
        one[0, 1] += 0.2
        assert not judged(want, one, gate=gate).ok  # the largest
        close = want.copy()
        close[:2, 5] = 9.5
        swapped = close.copy()
        swapped[0, 5] = 10.1
        assert judged(close, swapped, gate=gate).ok
        swapped[1, 5] = 10.1
        found = judged(close, swapped, gate=gate)
        assert not found.ok and found.agreement == 0.75 and not found.flips_outside_margin  # the share
        close[0, 5], swapped[:2, 5] = 8.9, (10.1, 9.5)
        found = judged(close, swapped, gate=gate)
        assert not found.ok and found.flips_outside_margin == 1 and found.agreement > 0.8  # the lead

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("side", ["source", "export", "both"])
    def test_not_finite_never_passes(self, bad: float, side: str) -> None:
        good, broken = [[1.0, 2.0]], [[1.0, bad]]
        parity = judged(good if side == "export" else broken, good if side == "source" else broken)
        assert not parity.ok and not parity.finite and parity.max_abs is None
        with pytest.raises(NumericsError, match="NaN or infinite"):
            check(parity)
        assert Parity.model_validate_json(parity.model_dump_json()) == parity  # no NaN in the file

    def test_the_error_carries_the_figures(self) -> None:
        with pytest.raises(NumericsError) as caught:
            check(judged([[1.0, 0.0]], [[0.0, 1.0]]), where="model.onnx")
        error = caught.value
        assert error.exit_code == 6 and error.where == "model.onnx" and error.fix
        assert "largest logit difference 1, allowed 0.0001; mean 1, allowed 0.0001; 1 classes differ, 1 outside" in error.what

    def test_another_number_of_classes(self) -> None:
        with pytest.raises(NumericsError, match="shape"):
            judged([[1.0, 0.0]], [[1.0, 0.0, 0.0]])

    def test_no_images(self) -> None:
        with pytest.raises(NumericsError, match="at least one image"):
            compare(Table([[1.0]]), Table([[1.0]]), np.empty((0, 1, 1, 1), np.float32))

    def test_a_batch_size_that_changes_the_answer_is_caught(self) -> None:
        class Moody(Table):
            def logits(self, x: Any) -> Any:
                return super().logits(x) + np.float32(len(x) == 3)

        index = np.arange(5, dtype=np.float32).reshape(-1, 1, 1, 1)
        logits = np.random.default_rng(0).normal(size=(5, 4))
        assert compare(Table(logits), Moody(logits), index, batches=(1, 2)).ok
        parity = compare(Table(logits), Moody(logits), index, batches=(3, 99))
        assert parity.batches == (3, 5) and not parity.ok and parity.max_abs == pytest.approx(1)


def pictures(n: int) -> Any:
    """Smooth coloured pictures: neither noise nor grey."""
    rng = np.random.default_rng(0)
    coarse = rng.random((n, 3, 4, 4), dtype=np.float32).repeat(8, 2).repeat(8, 3)
    return np.clip(coarse + 0.05 * rng.normal(size=coarse.shape), 0, 1).astype(np.float32)


def trained_like(name: str, width: float) -> torch.nn.Module:
    """Random weights, but statistics and logits of the size training leaves: a fresh net hardly looks at its input."""
    torch.manual_seed(0)
    normalize = {"mean": MEAN, "std": STD}
    net: torch.nn.Module = (
        Shelf("models")
        .get(name)
        .model_validate({"name": name, "width": width, "normalize": normalize})
        .build(channels=3, classes=CLASSES)
    )
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average: no rest of the initial 0 and 1
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for _ in range(4):
            net.train()(torch.tensor(pictures(48)))
        for module in net.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(4)
    return net.eval()


@pytest.fixture(scope="module", params=[("resnet18", 0.0625), ("mobilenet-v2", 0.125)], ids=lambda p: p[0])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PytorchEngine, onnx.ModelProto]:
    net = trained_like(*request.param)
    file = tmp_path_factory.mktemp("parity") / "model.onnx"
    to_onnx(net, file, input_shape=SHAPE, classes=[str(c) for c in range(CLASSES)])
    return PytorchEngine(net, input_shape=SHAPE, classes=CLASSES), onnx.load(str(file))


@pytest.fixture(scope="module")
def x() -> Any:
    return pictures(32)


def parity_of(source: PytorchEngine, model: onnx.ModelProto, x: Any, folder: Path) -> Parity:
    file = folder / "mutant.onnx"
    file.write_bytes(model.SerializeToString())
    with OrtEngine(file, threads=1) as engine:
        return compare(source, engine, x)


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    mutant = onnx.ModelProto()
    mutant.CopyFrom(model)
    return mutant


def floats(model: onnx.ModelProto) -> list[int]:
    return [i for i, w in enumerate(model.graph.initializer) if w.data_type == onnx.TensorProto.FLOAT]


def replace(model: onnx.ModelProto, index: int, change: Any) -> onnx.ModelProto:
    """A copy with one weight tensor changed."""
    mutant = copy_of(model)
    weight = mutant.graph.initializer[index]
    value = numpy_helper.to_array(weight).copy()
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(value)).astype(value.dtype), weight.name))
    return mutant


def test_the_right_export_passes(exported: Any, x: Any, tmp_path: Path) -> None:
    source, model = exported
    parity = check(parity_of(source, model, x, tmp_path))
    assert parity.agreement == 1 and parity.would_pass_at is not None and parity.would_pass_at < 1e-5
    assert parity.logit_range is not None and parity.logit_range > 1


def _constants_of(model: onnx.ModelProto, op: str) -> int:
    """The weight that the first node of this kind takes second."""
    name = next(node.input[1] for node in model.graph.node if node.op_type == op)
    return next(i for i, w in enumerate(model.graph.initializer) if w.name == name)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        pytest.param("Sub", lambda v: v * 0, id="mean left out"),
        pytest.param("Sub", lambda v: v * 255, id="mean on the 255 scale"),
        pytest.param("Sub", lambda v: v[:, ::-1], id="mean of BGR"),
        pytest.param("Sub", lambda v: v * 0 + np.reshape((0.485, 0.456, 0.406), (1, 3, 1, 1)), id="mean of ImageNet"),
        pytest.param("Div", lambda v: v * 0 + 1, id="std left out"),
        pytest.param("Div", lambda v: v * 0 + np.reshape((0.2023, 0.1994, 0.2010), (1, 3, 1, 1)), id="the other CIFAR std"),
        pytest.param("Conv", lambda v: v[:, ::-1], id="channels swapped"),
        pytest.param("Conv", lambda v: v.transpose(0, 1, 3, 2), id="height and width swapped"),
    ],
)
def test_wrong_preprocessing_is_caught(exported: Any, x: Any, op: str, change: Any, tmp_path: Path) -> None:
    source, model = exported
    mutant = replace(model, _constants_of(model, op), change)
    with pytest.raises(NumericsError, match="parity broken"):
        check(parity_of(source, mutant, x, tmp_path))


def _largest_zeroed(value: Any) -> Any:
    value.flat[np.abs(value).argmax()] = 0
    return value


def _truncated(value: Any) -> Any:
    value.flat[value.size // 2 :] = 0
    return value


def _eight_bits(value: Any) -> Any:
    """The mantissa cut to that of bfloat16: precision lost in silence."""
    return (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize(
    ("damage", "least"),
    # cutting the mantissa of a bias moves a logit by less than the gate's bound: only weights can show it
    [(_largest_zeroed, 1), (_truncated, 1), (np.negative, 1), (_eight_bits, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_to_any_one_tensor_is_caught(exported: Any, x: Any, damage: Any, least: int, tmp_path: Path) -> None:
    source, model = exported
    missed, tried = [], 0
    for index in floats(model)[:: 1 + len(model.graph.initializer) // 50]:
        value = numpy_helper.to_array(model.graph.initializer[index])
        if value.ndim < least or np.array_equal(damage(value.copy()), value):
            continue  # a zero has nothing to lose
        tried += 1
        parity = parity_of(source, replace(model, index, damage), x[:12], tmp_path)
        if parity.ok:
            missed.append((model.graph.initializer[index].name, value.shape, parity.would_pass_at))
    assert missed == [] and tried > 15


def test_a_dropped_activation_is_caught(exported: Any, x: Any, tmp_path: Path) -> None:
    source, model = exported
    mutant = copy_of(model)
    relu = next(node for node in mutant.graph.node if node.op_type == "Relu")
    relu.op_type = "Identity"
    assert not parity_of(source, mutant, x, tmp_path).ok
