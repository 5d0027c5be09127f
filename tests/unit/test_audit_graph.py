"""A file without a source is attacked through its own graph, once that has been held against the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from robustkd.auditing.controls import Unseen
from robustkd.auditing.graph import NAME, Graph, agrees, graph_wanted, rebuild
from robustkd.auditing.run import ArtifactFacts, SourceModel, run_audit
from robustkd.auditing.sides import Side
from robustkd.engines.importer.load import import_onnx
from robustkd.engines.ort import OrtEngine
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.threat import ThreatModel
from tests.audit_nets import Conv, TorchEngine, images, trained

#: the attacks alone; what else an audit checks has its own tests
POLICY = Policy(
    name="test", noise_draws=2, pgd_steps=5, apgd_steps=10, targets=2, square_queries=20, uint8="none",
    ladder_images=0, scale_images=0, memory_images=0, fresh_process=False,
)  # fmt: skip
FACTS = ArtifactFacts("x.onnx", "sha256:0")
THREAT = ThreatModel(eps=0.04)
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def data() -> Any:
    return images(64)


@pytest.fixture(scope="module")
def net(data: Any) -> torch.nn.Module:
    return trained(Conv(), images(256, seed=9))  # others than those audited, which it must not have memorised


def write(net: torch.nn.Module, file: Path, *, levels: bool = False, end: str = "", **last: Any) -> Path:
    """The net as ONNX by hand: `levels` puts int8 before each convolution and on its weights, `end` is one more node."""
    conv, norm, _, second, _ = net.body
    with torch.no_grad():
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        largest = float(net.body[:3](torch.from_numpy(images(64, seed=9).floats())).max())
        folded = (conv.weight * gain[:, None, None, None], (conv.bias - norm.running_mean) * gain + norm.bias)
    weights: dict[str, Any] = {"axes": np.array([2, 3])}
    nodes: list[Any] = []
    here = "images"
    for i, (weight, bias, attributes) in enumerate(
        [(*folded, {"pads": [1, 1, 1, 1]}), (second.weight, second.bias, {"strides": [2, 2]})]
    ):
        w = weight.detach().numpy()
        weights |= {f"w{i}": w, f"b{i}": bias.detach().numpy()}
        name = f"w{i}"
        if levels:
            scale = np.abs(w).max((1, 2, 3)) / 127
            weights |= {f"w{i}": np.rint(w / scale[:, None, None, None]).astype(np.int8), f"ws{i}": scale.astype(np.float32)}
            weights |= {f"s{i}": np.float32((1.0, largest)[i] / 127), f"z{i}": np.int8(0)}
            nodes.append(helper.make_node("QuantizeLinear", [here, f"s{i}", f"z{i}"], [f"q{i}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"d{i}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"ws{i}"], [f"f{i}"], axis=0))
            here, name = f"d{i}", f"f{i}"
        nodes.append(helper.make_node("Conv", [here, name, f"b{i}"], [f"c{i}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        here = f"r{i}"
    weights |= {"v": net.head.weight.detach().numpy(), "u": net.head.bias.detach().numpy()}
    nodes.append(helper.make_node("ReduceMean", [here, "axes"], ["m"], keepdims=0))
    nodes.append(helper.make_node("Gemm", ["m", "v", "u"], ["y"], transB=1))
    nodes.append(helper.make_node(end or "Identity", ["y"], ["logits"], name="the_end", **last))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    file.write_bytes(made.SerializeToString())
    return file


@pytest.fixture(scope="module")
def file(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(net, tmp_path_factory.mktemp("fp32") / "net.onnx")


@pytest.fixture(scope="module")
def levels(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(net, tmp_path_factory.mktemp("int8") / "net.onnx", levels=True)


def go(file: Path, data: Any, **more: Any) -> Any:
    audit = more.pop("audit", AuditConfig(batch_size=32, min_robust=5))
    policy = more.pop("policy", POLICY)
    other = images(64, seed=5)
    more = {"unseen": Unseen(other.floats(), other.labels), **more}
    engine = OrtEngine(file, threads=1)
    result, _ = run_audit(engine, artifact=FACTS, images=data, threat=THREAT, policy=policy, audit=audit, **more)
    return result


def check_of(result: Any, name: str = NAME) -> Any:
    return next((check for check in result.checks if check.name == name), None)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_file_alone_is_attacked_white_box_and_a_floor_can_pass(kind: str, data: Any, file: Path, levels: Path) -> None:
    path = file if kind == "fp32" else levels
    result = go(path, data, graph=rebuild(path))
    assert {a.level for a in result.engine.attacks.values()} == {"baseline", "surrogate", "blackbox"}
    assert check_of(result).status == "ok" and "of 64 attacked" in check_of(result).message
    assert check_of(result, "white-box levels") is None
    assert {c.name: c.status for c in result.checks}["S12 gradients not zero"] == "ok"
    assert {c.name: c.status for c in result.checks}["S17 label control"] == "ok"
    assert not [c for c in result.checks if c.status == "block"], result.checks
    assert result.verdict.status == "pass", result.verdict.reasons
    without = go(path, data)
    assert without.verdict.status == "inconclusive"
    assert result.engine.robust_accuracy.estimate < without.engine.robust_accuracy.estimate


def test_the_graph_of_an_fp32_file_attacks_as_its_source_does(data: Any, net: torch.nn.Module, file: Path) -> None:
    own = go(file, data, graph=rebuild(file))
    white = go(file, data, twin=net)
    attacks = [name for name, a in own.engine.attacks.items() if a.level == "surrogate"]
    same = [own.engine.attacks[name].robust_accuracy - white.engine.attacks[name].robust_accuracy for name in attacks]
    assert max(map(abs, same)) <= 1 / 64


def test_exact_derivatives_of_levels_are_stopped_by_the_sanity_checks(data: Any, levels: Path) -> None:
    """An int8 file looks unbreakable through its true gradient, which is zero; the audit does not believe it."""
    blind = go(levels, data, graph=Graph(import_onnx(levels, rounding="exact")))
    seeing = go(levels, data, graph=rebuild(levels))
    assert blind.engine.attacks["apgd-t"].robust_accuracy > seeing.engine.attacks["apgd-t"].robust_accuracy
    assert {c.name: c.status for c in blind.checks}["S12 gradients not zero"] == "block"
    assert blind.verdict.status == "invalid" and seeing.verdict.status == "pass", seeing.verdict


def test_a_graph_that_is_not_the_engines_counts_as_transfer_only(data: Any, net: torch.nn.Module, file: Path) -> None:
    other = Conv()
    other.load_state_dict(net.state_dict())
    other.head.bias.data[0] += 1.5  # other classes, the same gradients: only the comparison can tell
    result = go(file, data, graph=Graph(other.eval()))
    found = check_of(result)
    assert found.status == "warn" and found.observed < 0.98 and "transfer only" in found.message
    assert result.verdict.status == "inconclusive" and "transfer only" in result.verdict.reasons[0]
    assert "surrogate" in {a.level for a in result.engine.attacks.values()}


def test_a_file_that_cannot_be_rebuilt_is_audited_as_a_black_box_that_says_why(
    data: Any, net: torch.nn.Module, tmp_path: Path
) -> None:
    path = write(net, tmp_path / "net.onnx", end="Hardmax")
    graph = rebuild(path)
    assert graph.net is None
    result = go(path, data, graph=graph)
    said = check_of(result, "white-box levels")
    assert said.status == "skipped" and "Hardmax of node the_end" in said.message and "give a source" in said.message
    assert {a.level for a in result.engine.attacks.values()} == {"baseline", "blackbox"}
    assert result.verdict.status != "pass"


def test_a_softmax_at_the_end_hides_nothing(data: Any, net: torch.nn.Module, file: Path, tmp_path: Path) -> None:
    path = write(net, tmp_path / "net.onnx", end="Softmax", axis=1)
    result = go(path, data, graph=rebuild(path))
    assert check_of(result).status == "ok" and "probability" in check_of(result).message
    plain = go(file, data, graph=rebuild(file))
    assert abs(result.engine.robust_accuracy.estimate - plain.engine.robust_accuracy.estimate) <= 2 / 64


def test_a_quantised_file_with_a_source_has_two_twins(data: Any, net: torch.nn.Module, levels: Path) -> None:
    source = SourceModel(net, "checkpoint", "sha256:1")
    result = go(levels, data, source=source, graph=rebuild(levels), audit=AuditConfig(batch_size=32, tolerance=20))
    attacks = {name: a.level for name, a in result.engine.attacks.items()}
    assert attacks["apgd-ce"] == attacks["twin:apgd-ce"] == attacks["twin:apgd-t"] == "surrogate"
    assert "replay:apgd-ce" in attacks and check_of(result).status == "ok"
    assert result.verdict.status == "pass", result.verdict.reasons


def test_a_second_twin_that_does_not_agree_is_left_out(data: Any, net: torch.nn.Module, levels: Path) -> None:
    source = SourceModel(net, "checkpoint", "sha256:1")
    wrong = Graph(torch.nn.Sequential(trained(Conv(), data), torch.nn.Linear(4, 4)).eval())
    result = go(levels, data, source=source, graph=wrong, audit=AuditConfig(batch_size=32, tolerance=20))
    assert not [name for name in result.engine.attacks if name.startswith("twin:")]
    assert check_of(result).status == "warn" and result.verdict.status == "pass"


def test_which_files_get_a_graph(file: Path, levels: Path) -> None:
    def wanted(path: Path, **more: Any) -> Any:
        given = {"net": False, "source": False, "precision": "fp32", "policy": POLICY} | more
        return graph_wanted(path, None, **given)

    assert wanted(file).net is not None
    assert wanted(file, source=True) is None and wanted(file, net=True) is None
    assert wanted(levels, source=True, precision="int8") is None
    both = POLICY.model_copy(update={"twins": 2})
    assert wanted(levels, source=True, precision="int8", policy=both).net is not None
    assert wanted(file, source=True, policy=both) is None
    assert wanted(file.with_suffix(".engine")) is None


def test_agreement_counts_only_what_is_more_than_rounding(data: Any, net: torch.nn.Module) -> None:
    side = Side(TorchEngine(net, answer=lambda n, z: n(z) * (1 + 1e-6)).logits, 32)
    found = agrees(net, side, data.floats(), data.labels, THREAT, "logits", 0)
    assert found.status == "ok" and found.observed == 1
