"""The table of what rounding hides: true derivatives find nothing in an int8 file, and every row is read off the file."""

import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from bench.__main__ import main
from bench.masking import CLEAN, EIGHT_BIT, NAIVE, TARGETS, WORST, Bench, Budget, table
from robustkd import api
from robustkd.bundle import Bundle, create
from robustkd.datasets._open import open_dataset
from robustkd.exporting.graphs import inferred
from robustkd.exporting.int8 import quantize, tensors
from robustkd.exporting.ranges import measure
from robustkd.models._files import load_net, portable
from robustkd.recipe.target import Calibration
from robustkd.threat import ThreatModel
from tests.checkpoints import write_checkpoint

SMALL = Budget(n=8, pgd=3, steps=6, targets=2, queries=5, draws=2, batch=5)


def fitted(folder):
    """A checkpoint whose last layer alone was fitted, by least squares: right on many images, and easily fooled."""
    given = write_checkpoint(folder / "random")
    net = load_net(given)
    images = open_dataset(given.manifest.recipe["dataset"]).load("test")
    some = images.take(np.arange(600))
    with torch.no_grad():
        features = []
        hook = net.linear.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
        net(torch.from_numpy(some.floats()))
        hook.remove()
        known = torch.cat([features[0], torch.ones(600, 1)], 1)
        wanted = 20 * torch.nn.functional.one_hot(torch.from_numpy(some.labels), 10).float()
        weight = torch.linalg.lstsq(known, wanted).solution.T
        net.linear.weight.copy_(weight[:, :-1])
        net.linear.bias.copy_(weight[:, -1])
    told = {name: getattr(given.manifest, name) for name in ("recipe", "model", "threat")}
    with create(folder / "checkpoint", "checkpoint", **told) as (work, _):
        save_file(portable(net), work / "model.safetensors")
    return Bundle.open(folder / "checkpoint")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masking")
    source = fitted(folder)
    fp32 = api.export(source.path, targets=TARGETS[:1], output=folder)[0].file(".onnx")
    model, x = inferred(onnx.load(fp32)), Bench(source, ThreatModel(), SMALL, print).x.numpy()
    ranges = measure(model, x, Calibration(method="minmax"), tensors(model, "trt"))
    (folder / "int8-trt").mkdir()
    int8 = folder / "int8-trt" / fp32.name
    onnx.save(quantize(model, ranges, "trt"), str(int8))  # without the search for sensitive layers, which takes long
    return source, {"fp32": fp32, "int8-trt": int8}


def test_the_true_derivative_of_an_int8_file_is_zero_and_of_others_not(exported):
    source, files = exported
    bench = Bench(source, ThreatModel(eps=0.02), SMALL, lambda line: None)
    found = {name: bench.column(path) for name, path in files.items()}
    assert found["int8-trt"].zero[NAIVE] == 1.0 and found["fp32"].zero[NAIVE] == 0.0
    assert all(share == 0.0 for way, share in found["int8-trt"].zero.items() if way != NAIVE)
    for rows in found.values():
        tried = [flags for name, flags in rows.robust.items() if name not in (WORST, EIGHT_BIT)]
        assert len(tried) == 13 and np.array_equal(rows.robust[WORST], np.logical_and.reduce(tried))
        assert all((flags <= rows.robust[CLEAN]).all() for flags in rows.robust.values())
        assert rows.right.sum() >= 3 and rows.robust[WORST].sum() < rows.right.sum()
    naive = found["int8-trt"].robust
    assert naive[f"{NAIVE}, APGD-CE"].sum() > naive["own graph, masked, APGD-CE"].sum()
    assert np.array_equal(found["fp32"].robust[f"{NAIVE}, APGD-CE"], found["fp32"].robust["own graph, masked, APGD-CE"])


def test_the_command(exported, capsys):
    source, files = exported
    small = [word for name, value in vars(SMALL).items() for word in (f"--{name}", str(value))]
    words = ["masking", str(source.path), "--file", str(files["int8-trt"]), *small]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"]["n"] == 8 and found["environment"]["versions"]["torch"] and found["threat"]["eps"] == 8 / 255
    assert list(found["files"]) == ["int8-trt/model.onnx"]
    assert table(found).startswith("| robust accuracy | int8-trt/model.onnx |")
    for share in found["files"]["int8-trt/model.onnx"]["rows"].values():
        assert 0 <= share["low"] <= share["estimate"] <= share["high"] <= 1
