"""Honest files in every precision that robustkd exports fire no block: with their source, and as bare files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from robustkd.auditing.controls import Unseen
from robustkd.auditing.facts import SourceModel
from robustkd.auditing.graph import rebuild
from robustkd.auditing.run import run_audit
from robustkd.engines.ort import OrtEngine
from robustkd.exporting.calibration import Calibrated
from robustkd.exporting.graphs import inferred
from robustkd.exporting.precision import lower
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.recipe.target import Calibration, Target
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, images, trained
from tests.unit.test_audit_graph import FACTS, write

CALIBRATION = Calibration(n=64)
TARGETS = {
    "fp16": Target(name="fp16", precision="fp16"),
    "int8-trt": Target(name="trt", precision="int8", int8_profile="trt", calibration=CALIBRATION),
    "int8-ort-cpu": Target(name="cpu", precision="int8", int8_profile="ort-cpu", calibration=CALIBRATION),
    "int8-fp16": Target(name="both", precision="int8-fp16", calibration=CALIBRATION),
}
SMALL = Policy(
    name="small", noise_draws=3, pgd_steps=4, apgd_steps=8, targets=1, square_queries=30, square_ties_queries=20, twins=2,
    uint8="native", ladder_images=12, effort_images=8, effort_steps=5, scale_images=12, memory_images=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return trained(Conv(), images(256, seed=9))  # others than those audited, which it must not have memorised


@pytest.fixture(scope="module", params=TARGETS)
def file(request: Any, net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network through the passes of `robustkd export`."""
    folder, seen = tmp_path_factory.mktemp(request.param), images(64, seed=9).floats()
    plain = onnx.load(write(net, folder / "fp32.onnx"))
    plain.graph.node.pop()  # an Identity, which no export writes
    plain.graph.node[-1].output[0] = "logits"
    made = inferred(plain)
    calibrated = Calibrated(seen, {}) if "int8" in request.param else None
    (folder / "model.onnx").write_bytes(lower(made, TARGETS[request.param], calibrated).model.SerializeToString())
    return folder / "model.onnx"


def go(file: Path, **more: Any) -> Any:
    other = images(64, seed=5)
    options = {"unseen": Unseen(other.floats(), other.labels), "threat": ThreatModel(eps=0.04), "policy": SMALL, **more}
    with OrtEngine(file, threads=1) as engine:
        return run_audit(engine, artifact=FACTS, images=images(48), **options)[0]


def blocks(result: Any) -> list[Any]:
    return [check for check in result.checks if check.status == "block"]


def test_against_its_source(file: Path, net: torch.nn.Module) -> None:
    source = SourceModel(net, "checkpoint", "sha256:1")
    result = go(file, source=source, graph=rebuild(file), audit=AuditConfig(batch_size=48, tolerance=20))
    assert not blocks(result), blocks(result)
    assert result.verdict.status == "pass" and result.engine.robust_accuracy.estimate < result.engine.clean_accuracy.estimate
    assert not np.isnan(result.difference.robust.estimate)


def test_as_a_bare_file(file: Path) -> None:
    result = go(file, graph=rebuild(file), audit=AuditConfig(batch_size=48, min_robust=5))
    assert not blocks(result), blocks(result)
    assert {check.name: check.status for check in result.checks}["twin agreement"] == "ok"
    assert result.verdict.status == "pass", result.verdict.reasons
