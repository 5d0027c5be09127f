"""Engines as they come, through the command: refused with a sentence, or judged, and never called very robust.

A network that tells colours, held against files that hold it wrongly; and files that need no source.
"""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from robustkd.bundle import Bundle, ModelInfo, create
from robustkd.catalog import Shelf
from robustkd.models._files import load_net, portable
from robustkd.threat import ThreatModel
from tests.unit.test_audit_hidden import CHEAP, MEAN, STD, call, graph, pictures, templates, through_cli
from tests.unit.test_audit_verb import STUDENT

SIZE = 16
#: red, blue, red and green, blue and green: red and blue swapped makes another class of each
COLOURS = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "cheap.yaml"
    file.write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in CHEAP.items()))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Coloured images, a checkpoint that tells them apart, and its graph."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    y = np.arange(48) % 4
    x = 0.35 + 0.3 * COLOURS[y][:, :, None, None] + 0.05 * rng.standard_normal((48, 3, SIZE, SIZE))
    np.savez(root / "data.npz", x=(x.clip(0, 1) * 255).round().astype(np.uint8), y=y)
    config = Shelf("models").get("resnet18").model_validate({**STUDENT, "stem_stride": 2})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = config.build(channels=3, classes=4)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.5
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(15):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(torch.from_numpy(x).float()), torch.from_numpy(y)).backward()
            optimizer.step()
    info = ModelInfo(architecture="resnet18", classes=("a", "b", "c", "d"), input_shape=(3, SIZE, SIZE))
    recipe = {"student": config.model_dump(), "dataset": {"name": "npz", "test": [str(root / "data.npz")]}}
    with create(root / "checkpoint", "checkpoint", recipe=recipe, model=info, threat=ThreatModel(eps=2 / 255)) as (work, _):
        save_file(portable(net.eval()), work / "model.safetensors")
    program = torch.onnx.export(
        load_net(Bundle.open(root / "checkpoint")),
        (torch.rand(2, 3, SIZE, SIZE),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=18,
        verbose=False,
    )
    program.save(str(root / "model.onnx"), external_data=False)
    return root


def spoiled(home, *, before=(), after=(), constants=()):
    """The graph with nodes from `images` to `x` before it, and from `z` to `scores` after it."""
    model = onnx.load(home / "model.onnx")
    given, answer = model.graph.input[0].name, model.graph.output[0].name
    for node in model.graph.node:
        node.input[:] = ["x" if name == given and before else name for name in node.input]
        node.output[:] = ["z" if name == answer and after else name for name in node.output]
    if before:
        model.graph.input[0].name = "images"
        for node in reversed(before):
            model.graph.node.insert(0, node)
    if after:
        model.graph.output[0].name = "scores"
        model.graph.node.extend(after)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants)
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


def paired(capsys, home, tmp_path, policy, model, *words):
    onnx.save(model, str(tmp_path / "net.onnx"))
    base = ["audit", tmp_path / "net.onnx", "--source", home / "checkpoint", "--dataset", home / "data.npz", "--eps", "2/255"]
    told = ["--policy", policy, "--n", 24, "--tolerance", 40, "--json", "--output", tmp_path / "audit", *words]
    code, out, err = call(capsys, *base, *told)
    return code, json.loads(out) if out else None, err


def statuses(found, status):
    return {check["name"].split()[0] for check in found["checks"] if check["status"] == status}


def test_the_honest_file_passes(home, tmp_path, capsys, policy):
    code, found, err = paired(capsys, home, tmp_path, policy, spoiled(home))
    assert code == 0 and found["engine"]["clean_accuracy"]["estimate"] > 0.9, err
    assert not statuses(found, "block")


FOREIGN = {
    "BGR instead of RGB": {
        "before": [helper.make_node("Gather", ["images", "bgr"], ["x"], axis=1)],
        "constants": [("bgr", np.array([2, 1, 0]))],
    },
    "0 to 255 expected": {
        "before": [helper.make_node("Div", ["images", "levels"], ["x"])],
        "constants": [("levels", np.float32(255))],
    },
    "normalised twice, and inverted": {
        "before": [
            helper.make_node("Sub", ["images", "half"], ["apart"]),
            helper.make_node("Div", ["apart", "fifth"], ["x"]),
        ],
        "constants": [("half", np.float32(0.5)), ("fifth", np.float32(-0.2))],
    },
    "classes permuted": {
        "after": [helper.make_node("Gather", ["z", "order"], ["scores"], axis=1)],
        "constants": [("order", np.array([1, 2, 3, 0]))],
    },
}


@pytest.mark.parametrize("what", FOREIGN)
def test_another_preprocessing_or_order_is_exit_6(home, tmp_path, capsys, policy, what):
    code, found, err = paired(capsys, home, tmp_path, policy, spoiled(home, **FOREIGN[what]))
    assert code == 6 and found is None, (code, err)
    assert "parity is broken" in err and "channel order, range and normalisation" in err
    assert not (tmp_path / "audit").exists()


def test_a_source_that_is_not_the_parent_is_exit_6_and_the_file_alone_is_judged_by_its_floor(home, tmp_path, capsys, policy):
    shape = (3, SIZE, SIZE)
    stranger = graph(classes=4, shape=shape, weight=np.roll(templates(4, shape), 2, axis=0).T.copy())
    code, found, err = paired(capsys, home, tmp_path, policy, stranger)
    assert code == 6 and found is None and "without a source" in err, (code, err)
    code, out, err = call(
        capsys, "audit", tmp_path / "net.onnx", "--dataset", home / "data.npz", "--eps", "2/255", "--policy", policy,
        "--n", 24, "--min-clean", 90, "--json", "--output", tmp_path / "audit",
    )  # fmt: skip
    assert code in (10, 11, 12) and json.loads(out)["source"] is None, err


def test_softmax_inside(home, tmp_path, capsys, policy):
    after = [helper.make_node("Softmax", ["z"], ["scores"], axis=1)]
    code, found, err = paired(capsys, home, tmp_path, policy, spoiled(home, after=after))
    assert code in (0, 11) and "S4" in statuses(found, "warn") and not statuses(found, "block"), (err, found)
    s4 = next(check for check in found["checks"] if check["name"].startswith("S4"))
    assert "probabilities" in s4["message"]


@pytest.mark.parametrize("decisions", [0, 40])
def test_labels_alone(home, tmp_path, capsys, policy, decisions):
    """Without an attack that reads labels they are blocked; with one they warn."""
    after = [
        helper.make_node("ArgMax", ["z"], ["a"], axis=1, keepdims=0),
        helper.make_node("OneHot", ["a", "depth", "values"], ["scores"]),
    ]
    constants = [("depth", np.int64(4)), ("values", np.array([0, 1], np.float32))]
    own = tmp_path / "own.yaml"
    queries = [line for line in policy.read_text().splitlines() if "rays" not in line]
    own.write_text("\n".join([*queries, f"rays_queries: {decisions}", "hopskipjump_queries: 0\n"]))
    code, found, err = paired(capsys, home, tmp_path, own, spoiled(home, after=after, constants=constants))
    assert code == (0 if decisions else 12), (err, found)
    assert "S4" in statuses(found, "warn" if decisions else "block")


def test_half_precision_that_overflows_on_some_images(tmp_path, capsys, policy):
    """Sums above 65504 are Inf in half: such images are broken, and the check says so."""
    data = pictures()
    reach = np.abs(((data.floats() - MEAN) / STD).reshape(len(data), -1) @ templates(6).T).max(1)
    after = [
        helper.make_node("Mul", ["z", "much"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["logits"], to=TensorProto.FLOAT),
    ]
    model = graph(after=after, more={"much": np.float32(65504 / np.quantile(reach, 0.7))})
    code, found, err = through_cli(capsys, tmp_path, policy, model, data, "--min-clean", 20)
    assert code in (10, 12) and "S3" in statuses(found, "block"), (code, err)
    assert 0 < found["engine"]["clean_accuracy"]["estimate"] < 0.95


@pytest.mark.parametrize("batch", [1, 8])
def test_a_file_of_one_fixed_batch(tmp_path, capsys, policy, batch):
    """36 images fill no whole number of batches of 8; survivors fewer still."""
    free = through_cli(capsys, tmp_path, policy, graph(), pictures(), "--min-clean", 50)[1]
    model = graph()
    dimension = model.graph.input[0].type.tensor_type.shape.dim[0]
    dimension.ClearField("dim_param")
    dimension.dim_value = batch
    (tmp_path / "fixed").mkdir()
    code, found, err = through_cli(capsys, tmp_path / "fixed", policy, model, pictures(), "--min-clean", 50)
    assert code == 0 and found["engine"]["robust_accuracy"] == free["engine"]["robust_accuracy"], err


def test_all_images_fooled_at_once(tmp_path, capsys, policy):
    words = ("--eps", "0.4", "--min-robust", 10)
    code, found, err = through_cli(capsys, tmp_path, policy, graph(), pictures(), *words)
    assert code in (10, 12) and found["engine"]["robust_accuracy"]["estimate"] == 0, err
    assert found["engine"]["clean_accuracy"]["estimate"] > 0.9


def test_a_calibration_set_that_is_missing(home, tmp_path, capsys):
    words = ("--onnx", "--precision", "int8", "--calib", tmp_path / "none.npz", "--output", tmp_path / "out")
    code, out, err = call(capsys, "export", home / "checkpoint", *words)
    assert code in (3, 5) and out == "" and "fix:" in err and not (tmp_path / "out" / "onnx-int8").exists()


def test_a_place_of_odd_letters_where_the_locale_knows_none(tmp_path, policy):
    """Bytes of a path that the locale cannot read, and a screen that takes ASCII only."""
    place = tmp_path / "Prüfung é"
    place.mkdir()
    onnx.save(graph(), str(place / "netz.onnx"))
    np.savez(place / "data.npz", x=pictures().images, y=pictures().labels)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    told = ["--dataset", place / "data.npz", "--eps", "0.05", "--policy", policy, "--n", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "robustkd", "audit", place / "netz.onnx", *told, "--output", place / "audit"],
        env={**plain, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
    )
    assert done.returncode in (11, 12), done.stderr[-2000:]
    assert json.loads((place / "audit" / "result.json").read_text(encoding="utf-8"))["dataset"]["n"] == 12
