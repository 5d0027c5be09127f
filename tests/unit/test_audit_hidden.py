"""Engines and data as they come: each is audited rightly or refused with a sentence, never called very robust."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from robustkd.auditing.facts import ArtifactFacts, SourceModel
from robustkd.auditing.run import run_audit
from robustkd.cli.app import run as command
from robustkd.datasets._base import ImageSet
from robustkd.engines._open import open_engine
from robustkd.errors import NumericsError
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.unit.onnx_graphs import finish

MEAN, STD = 0.45, 0.2
SHAPE = (3, 4, 6)  # not square
CHEAP = {
    "noise_draws": 2,
    "pgd_steps": 3,
    "apgd_steps": 5,
    "targets": 2,
    "square_queries": 20,
    "ladder_images": 0,
    "scale_images": 0,
    "memory_images": 0,
    "fresh_process": False,
    "uint8": "none",
}


def templates(classes: int, shape=SHAPE) -> np.ndarray:
    """Some rows of pixels for each class; class sums differ, so that the images' mean must be taken off first."""
    channels, height, width = shape
    found = np.zeros((classes, channels * height, width), np.float32)
    for k, rows in enumerate(np.array_split(np.arange(channels * height), classes)):
        found[k, rows] = 0.3
    return found.reshape(classes, -1) + 0.1 * np.arange(classes, dtype=np.float32)[:, None]


def pictures(classes: int = 6, n: int = 72, shape=SHAPE, seed: int = 0) -> ImageSet:
    """Noise of the mean, brighter where the template of the label is."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    patch = (templates(classes, shape) > templates(classes, shape).min(1, keepdims=True) + 0.1).reshape(classes, *shape)
    x = MEAN + 0.04 * rng.standard_normal((n, *shape)) + 0.25 * (patch[y] - 1 / classes)
    pixels = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return ImageSet(pixels, y.astype(np.int64), tuple(f"c{i}" for i in range(classes)), "patches", "test")


class Net(torch.nn.Module):
    """The source: mean and deviation inside, then the templates."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(templates(classes).T.copy()))

    def forward(self, x):
        return ((x - MEAN) / STD).flatten(1) @ self.weight


def graph(
    *, classes=6, shape=SHAPE, before=(), normal=True, weight=None, after=(), kind=TensorProto.FLOAT, given=None, more=()
):
    """The source as an engine; nodes before and after may spoil it."""
    weight = templates(classes, shape).T.copy() if weight is None else weight
    half = weight.dtype == np.float16
    constants = {"mean": np.float32(MEAN), "std": np.float32(STD), "w": weight, **dict(more)}
    nodes, last = [*before], "x" if before else "images"
    if normal:
        nodes += [helper.make_node("Sub", [last, "mean"], ["c"]), helper.make_node("Div", ["c", "std"], ["s"])]
        last = "s"
    if half:
        nodes.append(helper.make_node("Cast", [last], ["h"], to=TensorProto.FLOAT16))
        last = "h"
    end = "z" if after or half else "logits"
    nodes += [helper.make_node("Flatten", [last], ["flat"]), helper.make_node("MatMul", ["flat", "w"], [end])]
    if half:
        nodes.append(helper.make_node("Cast", ["z"], ["logits"], to=TensorProto.FLOAT))
    nodes += after
    used = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used]
    return finish(nodes, ["n", *(given or shape)], kind, tensors)


def audited(model: onnx.ModelProto, folder: Path, *, images=None, **changes):
    """An audit of a graph against the source."""
    file = folder / "net.onnx"
    onnx.save(model, str(file))
    with open_engine(file) as engine:
        return run_audit(
            engine,
            artifact=ArtifactFacts(str(file), "sha256:0"),
            images=images or pictures(),
            threat=ThreatModel(eps=0.03),
            policy=Policy(name="cheap", **CHEAP),
            audit=AuditConfig(tolerance=8),
            **{"source": SourceModel(Net(), "s", "sha256:1"), **changes},
        )[0]


def blocks(result) -> list[str]:
    return [check.name for check in result.checks if check.status == "block"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return audited(graph(), tmp_path_factory.mktemp("honest"))


def test_the_honest_engine_passes(honest):
    assert honest.verdict.status == "pass" and not blocks(honest), honest.verdict.reasons
    assert 0.05 < honest.engine.robust_accuracy.estimate < honest.engine.clean_accuracy.estimate


def test_softmax_inside(honest, tmp_path):
    result = audited(graph(after=[helper.make_node("Softmax", ["z"], ["logits"], axis=1)]), tmp_path)
    s4 = next(c for c in result.checks if c.name.startswith("S4"))
    assert s4.status == "warn" and "probabilities" in s4.message and not blocks(result)
    assert result.engine.robust_accuracy.estimate == pytest.approx(honest.engine.robust_accuracy.estimate, abs=0.05)


def test_labels_only(tmp_path):
    after = [
        helper.make_node("ArgMax", ["z"], ["a"], axis=1, keepdims=0),
        helper.make_node("OneHot", ["a", "depth", "values"], ["logits"]),
    ]
    more = {"depth": np.int64(6), "values": np.array([0, 1], np.float32)}
    result = audited(graph(after=after, more=more), tmp_path)
    assert result.verdict.status != "pass" and "S4 output kind" in " ".join(blocks(result))


SWAPPED = [helper.make_node("Gather", ["images", "bgr"], ["x"], axis=1)]
SCALED = [helper.make_node("Div", ["images", "levels"], ["x"])]
FOREIGN = {
    "no normalisation": {"normal": False},
    "BGR": {"before": SWAPPED, "more": {"bgr": np.array([2, 1, 0])}},
    "0 to 255": {"before": SCALED, "more": {"levels": np.float32(255)}},
    "classes permuted": {"weight": np.roll(templates(6), 1, axis=0).T.copy()},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_another_preprocessing_is_a_parity_error(tmp_path, what):
    with pytest.raises(NumericsError, match="parity is broken") as caught:
        audited(graph(**FOREIGN[what]), tmp_path)
    assert "channel order, range and normalisation" in caught.value.fix


def test_an_engine_that_overflows_on_bright_images(tmp_path):
    """As half precision does above 65504, here in float: Inf is a broken image, and the check says so."""
    after = [helper.make_node("Mul", ["z", "much"], ["logits"])]
    result = audited(graph(after=after, more={"much": np.float32(1e38)}), tmp_path)
    assert any(name.startswith("S3") for name in blocks(result)) and result.verdict.status in ("invalid", "fail")
    assert result.engine.clean_accuracy.estimate < 0.9


def call(capsys, *words):
    code = command([*map(str, words)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "cheap.yaml"
    file.write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in CHEAP.items()))
    return file


def through_cli(capsys, tmp_path, policy, model, images, *words, labels=None, x=None):
    """`robustkd audit` on a bare file; the exit code, the result if there is one, and stderr."""
    onnx.save(model, str(tmp_path / "net.onnx"))
    y = images.labels if labels is None else labels
    np.savez(tmp_path / "data.npz", x=images.images if x is None else x, y=y)
    base = ["audit", tmp_path / "net.onnx", "--dataset", tmp_path / "data.npz", "--policy", policy, "--n", 36, "--json"]
    words = words if "--eps" in words else (*words, "--eps", "0.05")
    code, out, err = call(capsys, *base, "--output", tmp_path / "audit", *words)
    return code, json.loads(out) if out else None, err


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(tmp_path, capsys, policy, classes):
    code, found, err = through_cli(capsys, tmp_path, policy, graph(classes=classes), pictures(classes), "--min-clean", 50)
    assert code == 0, (err, found)
    assert ("apgd-t" in found["engine"]["attacks"]) == (classes > 3)
    assert any("apgd-t" in c["name"] and c["status"] == "skipped" for c in found["checks"]) == (classes < 4)


def test_grey_and_oblong(tmp_path, capsys, policy):
    shape = (1, 5, 9)
    model, images = graph(classes=4, shape=shape), pictures(4, shape=shape)
    code, found, err = through_cli(capsys, tmp_path, policy, model, images, "--min-clean", 50)
    assert code == 0 and found["dataset"]["n"] == 36, err
    last = images.images.transpose(0, 2, 3, 1)
    (tmp_path / "nhwc").mkdir()
    code, again, err = through_cli(capsys, tmp_path / "nhwc", policy, model, images, "--min-clean", 50, x=last)
    assert code == 0 and again["engine"]["robust_accuracy"] == found["engine"]["robust_accuracy"], err


def test_labels_of_other_kinds(tmp_path, capsys, policy):
    images = pictures()
    code, found, err = through_cli(
        capsys, tmp_path, policy, graph(), images, "--min-clean", 50, labels=images.labels.astype(np.int32)
    )
    assert code == 0, err
    (tmp_path / "hot").mkdir()
    hot = np.eye(6, dtype=np.int64)[images.labels]
    code, found, err = through_cli(capsys, tmp_path / "hot", policy, graph(), images, "--min-clean", 50, labels=hot)
    assert (code == 0 and found["engine"]["clean_accuracy"]["estimate"] > 0.9) or (code == 5 and "fix:" in err)


NOT_TAKEN = {
    "NHWC": graph(given=(4, 6, 3), before=[helper.make_node("Transpose", ["images"], ["x"], perm=[0, 3, 1, 2])]),
    "uint8 input": graph(kind=TensorProto.UINT8, before=[helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT)]),
    "class indices": graph(after=[helper.make_node("ArgMax", ["z"], ["logits"], axis=1, keepdims=0)]),
    "fewer classes": graph(classes=3),
}


@pytest.mark.parametrize("what", NOT_TAKEN)
def test_what_cannot_be_audited_is_refused(tmp_path, capsys, policy, what):
    model = NOT_TAKEN[what]
    if what == "uint8 input":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    if what == "class indices":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    code, found, err = through_cli(capsys, tmp_path, policy, model, pictures())
    assert code == 5 and found is None and "fix:" in err, (code, err)
    assert not (tmp_path / "audit").exists()


def test_eps_eight(tmp_path, capsys, policy):
    code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures(), "--eps", "8", "--min-robust", 60)
    assert code in (10, 12) and "8/255" in err
    assert found["engine"]["robust_accuracy"]["estimate"] <= 1 / 6 + 1e-9


def test_all_wrong_and_a_constant(tmp_path, capsys, policy):
    rolled = graph(weight=np.roll(templates(6), 1, axis=0).T.copy())
    code, found, err = through_cli(capsys, tmp_path, policy, rolled, pictures(), "--min-clean", 50)
    assert code in (10, 12) and found["engine"]["clean_accuracy"]["estimate"] == 0, err
    assert found["engine"]["robust_accuracy"]["estimate"] == 0
    (tmp_path / "constant").mkdir()
    constant = graph(weight=np.zeros((72, 6), np.float32))
    code, found, err = through_cli(capsys, tmp_path / "constant", policy, constant, pictures(), "--min-robust", 60)
    assert code in (10, 12) and found["engine"]["robust_accuracy"]["estimate"] == 0, err


def test_one_image_and_duplicates(tmp_path, capsys, policy):
    code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures(), "--n", 1, "--min-clean", 50)
    assert code == 11 and found["dataset"]["n"] == 1, err
    (tmp_path / "twice").mkdir()
    images = pictures().take(np.repeat(np.arange(6), 12))
    code, found, err = through_cli(capsys, tmp_path / "twice", policy, graph(), images, "--min-clean", 50)
    assert code in (0, 11, 12) and found["dataset"]["n"] == 36, err


@pytest.mark.parametrize("cut", [0, 30, -40])
def test_a_cut_file(tmp_path, capsys, cut):
    (tmp_path / "net.onnx").write_bytes(graph().SerializeToString()[:cut])
    np.savez(tmp_path / "data.npz", x=pictures().images, y=pictures().labels)
    code, out, err = call(capsys, "audit", tmp_path / "net.onnx", "--dataset", tmp_path / "data.npz", "--eps", "0.05")
    assert code == 5 and out == "" and "fix:" in err


def test_places_that_are_taken_or_cannot_be_written(tmp_path, capsys, policy):
    options = ("--min-clean", 50)
    assert through_cli(capsys, tmp_path, policy, graph(), pictures(), *options)[0] == 0
    before = (tmp_path / "audit" / "result.json").read_bytes()
    code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures(), *options)
    assert code == 5 and "finished audit" in err and (tmp_path / "audit" / "result.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures(), "--output", tmp_path / "file" / "audit")
    assert code == 5 and found is None and "fix:" in err
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return  # nothing is read-only for root
    (tmp_path / "locked").mkdir(mode=0o555)
    code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures(), "--output", tmp_path / "locked" / "audit")
    assert code == 5 and found is None and "fix:" in err


def test_while_another_audit_writes_there(tmp_path, capsys, policy):
    from robustkd.auditing.store import locked

    with locked(tmp_path / "audit"):
        code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures())
    assert code == 5 and "another audit" in err and found is None
