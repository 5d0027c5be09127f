"""The commands that look: list, show, copy, inspect, verify, doctor; through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from robustkd import bundle
from robustkd.cli import doctor as doctor_module
from robustkd.recipe.reading import read, validate
from robustkd.recipe.schema import Recipe
from robustkd.recipe.target import Target
from robustkd.resources import shipped
from tests.conftest import Outcome, environment
from tests.unit.audit_samples import result

Command = Callable[..., Outcome]
KINDS = ("methods", "recipes", "targets", "teachers", "students", "datasets", "attacks", "engines")


# list


@pytest.mark.parametrize("kind", KINDS)
def test_list_says_the_same_to_people_and_machines(kind: str, command: Command) -> None:
    code, out, _ = command("list", kind)
    assert code == 0
    rows = json.loads(command("list", kind, "--json").stdout)[kind]
    lines = out.splitlines()[1 if kind == "methods" else 0 :]
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert all(row["summary"] for row in rows), "every entry says in one line what it is"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("methods", "dgad"),
        ("recipes", "quickstart"),
        ("targets", "cpu-fp32"),
        ("students", "resnet18"),
        ("datasets", "cifar10"),
    ],
)
def test_list_knows_what_ships(kind: str, name: str, command: Command) -> None:
    assert name in [row["name"] for row in json.loads(command("list", kind, "--json").stdout)[kind]]


def test_list_methods_says_what_each_asks_for(command: Command) -> None:
    rows = {row["name"]: row for row in json.loads(command("list", "methods", "--json").stdout)["methods"]}
    dgad = rows["dgad"]
    assert (dgad["teachers"], dgad["through_teacher"], dgad["paper"]) == (["robust"], True, "Park & Min, ECCV 2024")
    assert dgad["cost"] == {"student": 26, "teachers": {"robust": 22}}
    assert (rows["trades"]["teachers"], rows["trades"]["through_teacher"]) == ([], False)
    code, out, err = command("list", "methods")
    head, *lines = out.splitlines()
    line = next(line for line in lines if line.startswith("dgad "))
    for title, cell in {
        "teachers": "robust",
        "gradient through teacher": "yes",
        "relative cost": "26 student + 22 robust",
    }.items():
        assert line[head.index(title) :].startswith(f"{cell} "), title
    assert line[head.index("paper") :] == "Park & Min, ECCV 2024"
    assert code == 0 and "a gradient to the input counts 1 more" in err


@pytest.mark.parametrize("kind", ["recipes", "targets", "teachers"])
def test_listing_files_imports_no_torch(kind: str) -> None:
    script = f"import sys; from robustkd.cli.app import run; run(['list', {kind!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True).returncode == 0


def test_list_of_a_misspelt_kind(command: Command) -> None:
    code, out, err = command("list", "metods")
    assert (code, out) == (3, "")
    assert err == "there is nothing called metods to list\n  fix: did you mean methods?\n"


# show


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A recipe of the user's that extends another one."""
    (tmp_path / "_base.yaml").write_text(
        "dataset: {name: fashion-mnist-10k}\nstudent: resnet18\nmethod: pgd-at\nthreat: {eps: 8/255}\n"
        "train:\n  epochs: 9\n  lr: 0.1\n"
    )
    child = tmp_path / "mine.yaml"
    child.write_text(
        "# Mine: for a test\n# second line\nextends: _base\ntrain:\n  epochs: 3\n  schedule: {milestones: [1, 2]}\n"
    )
    return child


def _lines(text: str) -> dict[str, tuple[str, str]]:
    """`key: value  # origin` lines by dotted key."""
    lines: dict[str, tuple[str, str]] = {}
    path: list[str] = []
    for line in text.splitlines():
        head, _, origin = line.partition("#")
        key, _, value = head.strip().partition(":")
        path = [*path[: (len(head) - len(head.lstrip())) // 2], key]
        lines[".".join(path)] = (value.strip(), origin.strip())
    return lines


def test_show_recipe_gives_each_value_its_origin(family: Path, command: Command) -> None:
    code, out, _ = command("show", "recipe", family, "--set", "train.momentum=0.5")
    assert code == 0
    lines = _lines(out)
    assert lines["train.epochs"] == ("3", "mine.yaml, line 5")
    assert lines["train.lr"] == ("0.1", "_base.yaml, line 7")
    assert lines["train.momentum"] == ("0.5", "--set train.momentum=0.5")
    assert lines["train.schedule.milestones"] == ("[1.0, 2.0]", "mine.yaml, line 6")
    assert lines["train.weight_decay"] == ("0.0005", "default")
    assert float(lines["threat.eps"][0]) == 8 / 255 and lines["threat.eps"][1] == "_base.yaml, line 4"
    assert lines["method.name"][0] == "pgd-at" and lines["seed"] == ("0", "default")


@pytest.mark.parametrize("name", shipped("recipe"))
def test_what_show_prints_is_the_same_recipe(name: str, command: Command) -> None:
    printed = yaml.safe_load(command("show", "recipe", name).stdout)
    assert Recipe.model_validate(printed) == validate(Recipe, read("recipe", name))


@pytest.mark.parametrize("name", shipped("target"))
def test_show_target(name: str, command: Command) -> None:
    printed = yaml.safe_load(command("show", "target", name).stdout)
    assert Target.model_validate(printed) == validate(Target, read("target", name))


def test_show_method(command: Command) -> None:
    code, out, _ = command("show", "method", "dgad")
    assert code == 0
    assert "gradient through teacher: yes" in out and "relative cost: 26 student + 22 robust (" in out
    for part in ("paper: ", "equation: inner: max ", "departures: ", "beta = 5.0", "recipes: ", "quickstart"):
        assert part in out


def test_show_teacher(command: Command) -> None:
    for row in json.loads(command("list", "teachers", "--json").stdout)["teachers"]:
        card = yaml.safe_load(command("show", "teacher", row["name"]).stdout)
        assert {"name", "model", "file", "dataset", "licence"} <= set(card)
        assert card["name"] == row["name"] and ("sha256" in card or card["published"])


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (("show", "recipee", "quickstart"), "did you mean recipe?"),
        (("show", "recipe", "quikstart"), "did you mean quickstart?"),
        (("show", "method", "dgda"), "did you mean dgad?"),
        (("show", "target", "cpu-fp3"), "did you mean cpu-fp32?"),
        (("copy", "recipes", "quickstart", "."), "did you mean recipe?"),
        (("copy", "recipe", "quikstart", "."), "did you mean quickstart?"),
    ],
)
def test_misspelt_names_are_3_with_the_nearest(args: tuple[str, ...], fix: str, command: Command) -> None:
    code, out, err = command(*args)
    assert (code, out) == (3, "")
    assert f"  fix: {fix}" in err


def test_show_of_an_unknown_teacher(command: Command) -> None:
    assert command("show", "teacher", "nobody").code == 3


def test_set_is_for_recipes_only(command: Command) -> None:
    assert command("show", "method", "dgad", "--set", "a=1").code == 3


# copy


@pytest.mark.parametrize("name", shipped("recipe"))
def test_a_copied_recipe_resolves_to_the_same(name: str, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert command("copy", "recipe", name, folder).code == 0
    assert validate(Recipe, read("recipe", str(folder / f"{name}.yaml"))) == validate(Recipe, read("recipe", name))


def test_a_copy_needs_no_parent_and_keeps_the_head(family: Path, command: Command, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    assert command("copy", "recipe", family, alone / "new.yaml").code == 0
    text = (alone / "new.yaml").read_text()
    assert text.startswith("# Mine: for a test\n# second line\n")
    assert "extends" not in yaml.safe_load(text)
    assert "eps: 8/255" in text, "values stay as they were written"
    recipe = validate(Recipe, read("recipe", str(alone / "new.yaml")))
    assert (recipe.name, recipe.train.epochs, recipe.train.lr) == ("new", 3, 0.1)


def test_a_file_without_parents_is_copied_byte_for_byte(command: Command, tmp_path: Path) -> None:
    assert command("copy", "target", "cpu-fp32", ".").code == 0
    assert (tmp_path / "cpu-fp32.yaml").read_bytes() == shipped("target")["cpu-fp32"].read_bytes()


def test_copy_overwrites_only_with_force(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("precious")
    code, _, err = command("copy", "recipe", "quickstart", file)
    assert code == 5 and "--force" in err
    assert file.read_text() == "precious"
    assert command("copy", "recipe", "quickstart", file, "--force").code == 0
    assert "precious" not in file.read_text()


def test_copy_into_nowhere(command: Command) -> None:
    code, _, err = command("copy", "recipe", "quickstart", "no/such/folder/x.yaml")
    assert code == 5 and "mkdir -p" in err
    assert command("copy", "recipe", "quickstart", "no-folder-of-this-name").code == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_copy_where_nothing_may_be_written(command: Command, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        assert command("copy", "recipe", "quickstart", tmp_path / "x.yaml").code == 5
    finally:
        tmp_path.chmod(0o755)


# verify


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """runs/demo with a checkpoint, an export of it and an audit of that."""
    run = tmp_path / "runs" / "demo"
    with bundle.create(run / "checkpoint", "checkpoint") as (work, _):
        (work / "model.safetensors").write_bytes(b"weights")
    first = bundle.Bundle.open(run / "checkpoint")
    with bundle.create(run / "cpu-fp32", "onnx", parent=first) as (work, _):
        (work / "model.onnx").write_bytes(b"graph")
    made = bundle.Bundle.open(run / "cpu-fp32")
    about = result(source=False)
    engine = about.artifact.model_copy(update={"sha256": made.manifest.files["model.onnx"]})
    with bundle.create(run / "cpu-fp32" / "audit", "audit", parent=made) as (work, _):
        (work / "result.json").write_text(about.model_copy(update={"artifact": engine}).model_dump_json())
    return run


def test_verify_follows_the_chain_to_its_start(chain: Path, command: Command) -> None:
    code, out, _ = command("verify", chain / "cpu-fp32" / "audit", "--json")
    assert code == 0
    links = json.loads(out)["bundles"][0]
    assert [link["kind"] for link in links] == ["audit", "onnx", "checkpoint"]
    assert [link["parent"] for link in links[:2]] == [link["digest"] for link in links[1:]]
    assert links[-1]["parent"] is None
    human = command("verify", chain / "cpu-fp32" / "audit").stdout
    assert human.endswith("digests and chain of parents match\n")


def test_verify_of_a_run_folder_checks_every_bundle(chain: Path, command: Command) -> None:
    assert len(json.loads(command("verify", chain, "--json").stdout)["bundles"]) == 3
    _flip(chain / "checkpoint" / "model.safetensors")
    assert command("verify", chain).code == 5


def _flip(file: Path, at: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["cpu-fp32/audit/result.json", "cpu-fp32/model.onnx", "checkpoint/model.safetensors"])
def test_one_flipped_byte_anywhere_in_the_chain_is_5(file: str, chain: Path, command: Command) -> None:
    _flip(chain / file)
    code, out, err = command("verify", chain / "cpu-fp32" / "audit")
    assert (code, out) == (5, "")
    assert Path(file).name in err


def test_a_parent_whose_manifest_was_changed_is_not_accepted(chain: Path, command: Command) -> None:
    manifest = chain / "checkpoint" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"created": "yesterday"}))
    code, _, err = command("verify", chain / "cpu-fp32")
    assert code == 5
    assert "parent" in err and "--parents" in err


def test_a_bundle_away_from_its_parent(chain: Path, command: Command, tmp_path: Path) -> None:
    moved = tmp_path / "board" / "engine"
    moved.parent.mkdir()
    (chain / "cpu-fp32").rename(moved)
    assert command("verify", moved).code == 5
    assert command("verify", moved, "--alone").code == 0
    assert command("verify", moved, "--parents", chain).code == 0


def test_verify_of_something_else(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty", "missing"):
        assert command("verify", name).code == 5


# inspect


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((12, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="a test", ir_version=10)
    helper.set_model_props(model, {"robustkd.eps": "0.03"})
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    return file


def test_inspect_onnx(onnx_file: Path, command: Command) -> None:
    code, out, _ = command("inspect", onnx_file, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["kind"] == "onnx" and facts["sha256"] == bundle.sha256(onnx_file)
    assert facts["inputs"] == {"x": "float [N, 3, 2, 2]"} and facts["outputs"] == {"logits": "float [N, 3]"}
    assert (facts["parameters"], facts["opset"], facts["quantized"]) == (36, {"ai.onnx": 20}, False)
    assert facts["metadata"] == {"robustkd.eps": "0.03"}
    assert "float [N, 3, 2, 2]" in command("inspect", onnx_file).stdout


@pytest.mark.parametrize("keep", [0, 40, -5])
def test_inspect_of_a_truncated_onnx_file_is_5(keep: int, onnx_file: Path, command: Command) -> None:
    onnx_file.write_bytes(onnx_file.read_bytes()[:keep])
    code, out, err = command("inspect", onnx_file)
    assert (code, out) == (5, "")
    assert "not a valid ONNX file" in err and str(onnx_file) in err


def test_inspect_safetensors(command: Command, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "net.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}, file, metadata={"who": "test"})
    facts: dict[str, Any] = json.loads(command("inspect", file, "--json").stdout)
    assert (facts["kind"], facts["numbers"], facts["types"]) == ("safetensors", 10, ["F16", "F32"])
    assert facts["metadata"] == {"who": "test"} and facts["tensors"] == {"a": [2, 3], "b": [4]}
    file.write_bytes(file.read_bytes()[:30])
    assert command("inspect", file).code == 5


def test_inspect_bundle(chain: Path, command: Command) -> None:
    facts = json.loads(command("inspect", chain / "cpu-fp32", "--json").stdout)
    assert facts["kind"] == "onnx" and list(facts["files"]) == ["model.onnx"]
    _flip(chain / "cpu-fp32" / "model.onnx")
    assert command("inspect", chain / "cpu-fp32").code == 5


def test_inspect_of_something_else(command: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    code, _, err = command("inspect", "notes.txt")
    assert code == 5 and ".onnx" in err
    assert command("inspect", "missing.onnx").code == 5


# doctor


def test_doctor_says_what_is_here(cli: Command) -> None:
    code, out, err = cli("doctor", "--json", env={"ROBUSTKD_DATA": "/nowhere"})
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {"robustkd", "python", "numpy", "onnx"} <= set(found["versions"])
    assert found["hardware"]["usable_cores"] >= 1 and found["hardware"]["load"] >= 0
    assert found["data"] == {"path": "/nowhere", "exists": False, "set_by": "ROBUSTKD_DATA"}
    assert found["runs"]["writable"] is True
    assert found["extras"]["core"]["missing"] == []


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torchvision takes seconds; one test above does it."""
    monkeypatch.setattr(doctor_module, "import_error", lambda module: None)


@pytest.mark.usefixtures("no_trial")
def test_doctor_for_people(command: Command) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    for word in ("python", "cpu", "gpu", "[train]", "data", "runs"):
        assert any(line.startswith(word) for line in out.splitlines()), word


@pytest.mark.usefixtures("no_trial")
def test_doctor_finds_a_runs_folder_that_cannot_be_made(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ROBUSTKD_RUNS", str(tmp_path / "file" / "runs"))
    found = json.loads(command("doctor", "--json").stdout)
    assert found["runs"]["writable"] is False
    assert any("ROBUSTKD_RUNS" in problem["fix"] for problem in found["problems"])


@pytest.mark.usefixtures("no_trial")
def test_doctor_names_the_install_line_of_a_missing_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustkd.cli import _extras

    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name == "jinja2" else object())
    out = command("doctor").stdout
    assert "missing jinja2; to write report.html: pip install 'robustkd[report]'" in out


@pytest.mark.parametrize(
    ("torch", "torchvision", "wrong"),
    [
        ("2.14.1", "0.29.1", False),
        ("2.14.1+cpu", "0.29.1+cpu", False),
        ("2.6.0", "0.21.0", False),
        ("2.14.1", "0.28.0", True),
        ("2.14.1+cpu", "0.29.1+cu130", True),
        ("3.0.0", "0.40.0", False),
    ],
)
def test_doctor_knows_which_torchvision_goes_with_torch(torch: str, torchvision: str, wrong: bool) -> None:
    assert (doctor_module.pair_problem(torch, torchvision) is not None) == wrong


def test_doctor_reports_a_torchvision_that_does_not_import(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "import_error", lambda module: f"RuntimeError: operator {module}::nms does not exist")
    out = command("doctor").stdout
    assert "problem: torchvision" in out and "operator torchvision::nms does not exist" in out


def test_an_import_that_fails_is_told_from_one_that_works() -> None:
    assert doctor_module.import_error("json") is None
    assert "no_such_module" in str(doctor_module.import_error("no_such_module"))
