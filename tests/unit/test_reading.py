"""Recipes from YAML: merging, overrides, and errors that name file, line and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from robustkd.errors import ConfigError
from robustkd.recipe.reading import Source, override, read, read_yaml, validate
from robustkd.recipe.schema import Recipe

MINIMAL = """\
dataset: fashion-mnist-10k
student: {name: resnet18, width: 0.25}
method: {name: pgd-at}
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


def load(folder: Path, text: str, *settings: str) -> Recipe:
    return validate(Recipe, override(read("recipe", write(folder, "mine", text)), settings))


def refused(folder: Path, text: str, *settings: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *settings)
    assert caught.value.exit_code == 3
    return caught.value


# --- one file


def test_a_minimal_recipe_gets_the_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe.name == "mine" and recipe.dataset.name == "fashion-mnist-10k"
    assert recipe.student.width == 0.25 and recipe.inner.steps == 10 and recipe.threat.eps == 8 / 255


def test_pixel_distances_are_written_as_quotients(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL + "threat: {eps: 4/255}\ninner: {step_size: 0.5 / 255}\n")
    assert recipe.threat.eps == 4 / 255 and recipe.inner.step_size == 0.5 / 255


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no mapping"),
        ("- a\n- b\n", "no mapping"),
        ("just words\n", "no mapping"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: 1\nb: c: d\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("a: !secret x\n", "not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: !!int abc\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("a: &x [*x]\n", "aliases"),
        ("a: &x {b: 1}\nc: *x\n", "aliases"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "aliases"),
    ],
)
def test_a_bad_file_is_a_config_error(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read_yaml(Path(write(tmp_path, "bad", text)))
    assert "bad.yaml" in caught.value.where


def test_unfolding_aliases_is_refused_before_it_costs_anything(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="aliases") as caught:
        read_yaml(Path(write(tmp_path, "bomb", "\n".join(lines))))
    assert caught.value.where.endswith("line 2")


def test_files_that_are_no_utf8_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for path in (tmp_path / "latin.yaml", tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            read_yaml(path)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [("a: 1\nb: 2\na: 3\n", "a", 3), ("a:\n  b: 1\n  c: 2\n  b: 3\n", "a.b", 4), ("a: [{b: 1, b: 2}]\n", "a.0.b", 1)],
)
def test_a_key_given_twice(tmp_path: Path, text: str, key: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is given twice") as caught:
        read_yaml(Path(write(tmp_path, "twice", text)))
    assert caught.value.where == f"{tmp_path / 'twice.yaml'}, line {line}"


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    source = read_yaml(Path(write(tmp_path, "lines", "a: 1\nb:\n  c: [x,\n    y]\n")))
    file = str(tmp_path / "lines.yaml")
    assert source.where(("a",)) == f"{file}, line 1"
    assert source.where(("b", "c")) == f"{file}, line 3"
    assert source.where(("b", "c", 1)) == f"{file}, line 4"
    assert source.where(("b", "unknown", "deeper")) == f"{file}, line 2", "the nearest part above it"


# --- messages


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("epohcs: 3", "epohcs is not a field", "valid: addons, audit, "),
        ("methd: {}", "methd is not a field", "did you mean method?"),
        ("train: {epohcs: 3}", "train.epohcs is not a field", "did you mean epochs?"),
        ("train: {schedule: {warmpu: 1}}", "train.schedule.warmpu is not a field", "did you mean warmup?"),
        ("audit: {tolerence: 1}", "audit.tolerence is not a field", "did you mean tolerance?"),
        ("threat: {esp: 0.1}", "threat.esp is not a field", "did you mean eps?"),
        ("train: {epochs: many}", "train.epochs: input should be a valid integer", 'it is "many"'),
        ("train: {epochs: 0}", "train.epochs: input should be greater than or equal to 1", "it is 0"),
        ("train: {lr: .inf}", "train.lr: input should be a finite number", "it is"),
        ("train: {lr: .nan}", "train.lr: input should be", "it is"),
        ("train: 3", "train: input should be", "it is 3"),
        ("threat: {eps: far}", "threat.eps: 'far' is not a pixel distance; write 8/255 or 0.0314", 'it is "far"'),
        ("threat: {norm: l3}", "threat.norm: input should be 'linf' or 'l2'", "valid: l2, linf"),
        ("seed: -1", "seed: input should be greater", "it is -1"),
        ("teachers: {id: a}", "teachers: input should be a valid tuple", "it is"),
        ("teachers: [{role: robust}]", "teachers.0: a teacher needs either id or path", "it is"),
        ("teachers: [{id: a, rol: clean}]", "teachers.0.rol is not a field", "did you mean role?"),
        (
            "teachers: [{path: a, model: {name: cifar-resnet, dept: 20}}]",
            "teachers.0.model.dept is not a field",
            "did you mean depth?",
        ),
    ],
)
def test_a_wrong_value_names_key_line_and_remedy(tmp_path: Path, line: str, what: str, fix: str) -> None:
    error = refused(tmp_path, f"{MINIMAL}{line}\n")
    assert error.what.startswith(what)
    assert error.where == f"{tmp_path / 'mine.yaml'}, line 4"
    assert error.fix.startswith(fix)


@pytest.mark.parametrize(
    ("section", "what", "fix"),
    [
        ("method: {name: pgd_at}", "method: pgd_at is not on the shelf of methods", "did you mean pgd-at?"),
        ("method: pgdat", "method: pgdat is not on the shelf of methods", "did you mean pgd-at?"),
        ("method: {name: trades, betta: 1}", "method.betta is not a field", "did you mean beta?"),
        ("method: {beta: 1}", "method", ""),
        ("method: {name: 3}", "method", ""),
    ],
)
def test_a_wrong_shelf_entry(tmp_path: Path, section: str, what: str, fix: str) -> None:
    error = refused(tmp_path, f"dataset: fashion-mnist-10k\nstudent: resnet18\n{section}\n")
    assert error.what.startswith(what) and error.fix.startswith(fix)
    assert error.where.endswith("mine.yaml, line 3")


def test_a_missing_section_says_what_to_add(tmp_path: Path) -> None:
    error = refused(tmp_path, "dataset: fashion-mnist-10k\nmethod: standard\n")
    assert error.what == "student is missing" and "add student" in error.fix


def test_teachers_must_be_those_the_method_wants(tmp_path: Path) -> None:
    text = "dataset: fashion-mnist-10k\nstudent: resnet18\nmethod: rslad\n"
    assert "rslad wants robust teacher(s), the recipe gives none" in refused(tmp_path, text).what.lower()
    assert "gives clean" in refused(tmp_path, text + "teachers: [{id: a, role: clean}]\n").what
    assert "wants no teacher(s)" in refused(tmp_path, MINIMAL + "teachers: [{id: a}]\n").what


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    refused(tmp_path, MINIMAL + "1: 2\n")
    refused(tmp_path, MINIMAL + "train: {1: 2}\n")


def test_an_unknown_recipe_suggests_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not a shipped recipe"):
        read("recipe", "no-such-recipe")
    with pytest.raises(ConfigError, match="there is no recipe file"):
        read("recipe", "no-such-recipe.yaml")


# --- extends


def chain(folder: Path, **files: str) -> Source:
    for name, text in files.items():
        write(folder, name, text)
    return read("recipe", str(folder / "mine.yaml"))


def test_maps_merge_and_lists_replace(tmp_path: Path) -> None:
    source = chain(
        tmp_path,
        _base="train: {epochs: 9, lr: 0.5, augment: [crop, flip]}\ntargets: [a, b]\n",
        mine="extends: _base\ntrain: {epochs: 2, augment: [flip]}\ntargets: [c]\n",
    )
    assert source.values["train"] == {"epochs": 2, "lr": 0.5, "augment": ["flip"]}
    assert source.values["targets"] == ["c"] and "extends" not in source.values
    assert source.where(("train", "epochs")).endswith("mine.yaml, line 2")
    assert source.where(("train", "lr")).endswith("_base.yaml, line 1")
    assert source.where(("targets", 1)).endswith("mine.yaml, line 3"), "the parent's second target is gone"


def test_another_shelf_entry_leaves_the_parents_knobs_behind(tmp_path: Path) -> None:
    source = chain(
        tmp_path,
        _base="method:\n  name: dgad\n  beta: 10\n  kl_scale: 0.5\nstudent: {name: resnet18, width: 0.5}\n",
        mine="extends: _base\nmethod:\n  name: trades\nstudent: {name: resnet18, stem_stride: 2}\n",
    )
    assert source.values["method"] == {"name": "trades"}
    assert source.values["student"] == {"name": "resnet18", "width": 0.5, "stem_stride": 2}
    assert source.where(("method", "beta")).endswith("mine.yaml, line 2"), "not the line of dgad's beta"


def test_an_entry_written_as_one_word_merges_like_its_long_form(tmp_path: Path) -> None:
    source = chain(tmp_path, _base="method: trades\n", mine="extends: _base\nmethod: {beta: 3}\n")
    assert source.values["method"] == {"name": "trades", "beta": 3}
    source = chain(tmp_path, _base="method: {name: trades, beta: 3}\n", mine="extends: _base\nmethod: rslad\n")
    assert source.values["method"] == "rslad"


def test_the_recipes_own_name_keeps_its_parents_values(tmp_path: Path) -> None:
    source = chain(tmp_path, _base=f"name: base\n{MINIMAL}", mine="extends: _base\nname: mine-too\nseed: 4\n")
    recipe = validate(Recipe, source)
    assert (recipe.name, recipe.seed, recipe.student.width) == ("mine-too", 4, 0.25)


def test_two_levels_and_no_more(tmp_path: Path) -> None:
    source = chain(tmp_path, _a="seed: 1\ntargets: [a]\n", _b="extends: _a\nseed: 2\n", mine="extends: _b\n")
    assert source.values == {"seed": 2, "targets": ["a"], "name": "mine"}
    with pytest.raises(ConfigError, match="deeper than two") as caught:
        chain(tmp_path, _0="seed: 0\n", _a="extends: _0\n", _b="extends: _a\n", mine="extends: _b\n")
    assert caught.value.where.endswith("_a.yaml, line 1")


@pytest.mark.parametrize("parent", ["mine", "_other", "./mine.yaml"])
def test_circles(tmp_path: Path, parent: str) -> None:
    with pytest.raises(ConfigError, match="circle"):
        chain(tmp_path, _other="extends: mine\n", mine=f"extends: {parent}\n")


@pytest.mark.parametrize("parent", ["parent", "parent.yaml", "./parent.yaml", "sub/deep.yaml"])
def test_a_parent_is_found_beside_its_child(tmp_path: Path, parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "deep", "seed: 7\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    source = chain(tmp_path, parent="seed: 7\n", mine=f"extends: {parent}\n")
    assert source.values["seed"] == 7


@pytest.mark.parametrize("value", ["[a, b]", "3", "{a: b}"])
def test_extends_names_one_parent(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="one parent") as caught:
        chain(tmp_path, mine=f"seed: 1\nextends: {value}\n")
    assert caught.value.where.endswith("line 2")


def test_an_error_in_a_parent_names_the_parent(tmp_path: Path) -> None:
    source = chain(tmp_path, _base=f"{MINIMAL}train:\n  epochs: none\n", mine="extends: _base\n")
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, source)
    assert caught.value.where == f"{tmp_path / '_base.yaml'}, line 5"


# --- --set


@pytest.mark.parametrize(
    ("settings", "path", "value"),
    [
        (["train.epochs=2"], "train.epochs", 2),
        (["train.lr=1e-2", "train.lr=0.5"], "train.lr", 0.5),
        (["threat.eps=4/255"], "threat.eps", 4 / 255),
        (["train.augment=[flip]"], "train.augment", ("flip",)),
        (["train={epochs: 3}"], "train.epochs", 3),
        (["student.normalize={mean: [0.5], std: [0.5]}"], "student.normalize.mean", (0.5,)),
        (["method=trades"], "method.name", "trades"),
        (["method=trades", "method.beta=3"], "method.beta", 3),
        (["method.name=trades", "method.beta=3"], "method.beta", 3),
        (["dataset.holdout=5"], "dataset.holdout", 5),
        (["name=other"], "name", "other"),
        (["train.grad_clip="], "train.grad_clip", None),
    ],
)
def test_settings_come_last(tmp_path: Path, settings: list[str], path: str, value: Any) -> None:
    found: Any = load(tmp_path, MINIMAL, *settings)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("train.epochs", "is not a setting"),
        ("=3", "is not a setting"),
        ("", "is not a setting"),
        ("train.epochs=[", "is not YAML"),
        ("train.epochs=2024-13-45", "is not YAML"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("train.epohcs=1", "train.epohcs is not a field"),
        ("train={epohcs: 1}", "train.epohcs is not a field"),
        ("train.=1", "train. is not a field"),
        ("teachers.0.id=x", "teachers is a list"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, setting: str, what: str) -> None:
    error = refused(tmp_path, MINIMAL, setting)
    assert what in error.what and error.where.startswith("--set")
