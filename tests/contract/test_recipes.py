"""The recipes of the papers: all there, valid, with the papers' settings, and with heads that say what is true."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from robustkd.api import load_recipe
from robustkd.cli._stock import head, headline
from robustkd.recipe.reading import MAX_LEVELS
from robustkd.recipe.schema import Recipe
from robustkd.resources import find, shipped
from robustkd.training.schedule import rate
from robustkd.training.teachers import read_card
from tests.conftest import ROOT
from tests.macs import cost_line, giga_macs

METHODS = (
    *("pgd-at", "trades", "mart", "ard", "iad", "rslad", "akd", "adaad", "dgad"),
    *("mtard", "b-mtard", "advfunmatch", "kd", "saad"),
)
STUDENTS = {"mnv2": "mobilenet-v2", "rn18": "resnet18"}
DATASETS = {"": "cifar10", "-cifar100": "cifar100", "-tiny": "tiny-imagenet"}
NAMES = [f"{m}-{s}{d}" for m in METHODS for s in STUDENTS for d in ("", "-cifar100")]
NAMES += [f"{m}-rn18-tiny" for m in ("ard", "rslad", "adaad", "dgad")]
#: methods.md, section 7
PARAMETERS = {
    ("mobilenet-v2", 10): 2_296_922,
    ("mobilenet-v2", 100): 2_412_212,
    ("resnet18", 10): 11_173_962,
    ("resnet18", 100): 11_220_132,
    ("resnet18", 200): 11_271_432,
}
every = pytest.mark.parametrize("name", NAMES)


def split(name: str) -> tuple[str, str, str]:
    """Method, student and data set of a name."""
    method, student, data = re.fullmatch(r"(.+)-(mnv2|rn18)(-\w+)?", name).groups(default="")  # type: ignore[union-attr]
    return method, student, data


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(name)


def told(name: str) -> str:
    """The head without its comment signs."""
    return "\n".join(
        line.removeprefix("#").removeprefix(" ") for line in head(shipped("recipe")[name].read_text()).splitlines()
    )


def test_every_method_student_and_data_set_has_its_recipe() -> None:
    others = {name for name in shipped("recipe") if not name.startswith(("quickstart", "teacher-"))}
    assert others == set(NAMES)


@every
def test_a_recipe_is_what_its_name_says(name: str) -> None:
    method, student, data = split(name)
    plan = recipe(name)
    assert (plan.name, plan.method.name) == (name, method)
    assert (plan.student.name, plan.dataset.name) == (STUDENTS[student], DATASETS[data])
    assert plan.threat.norm == "linf" and plan.threat.eps == pytest.approx(8 / 255)
    assert plan.dataset.holdout >= 1000, "the best epoch is chosen on images that are neither trained nor tested on"


@every
def test_students_have_the_papers_size(name: str) -> None:
    plan = recipe(name)
    facts = plan.dataset.facts
    assert facts is not None and plan.student.normalize is None
    with torch.device("meta"):
        net = plan.student.build(channels=facts.shape[0], classes=facts.classes)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[plan.student.name, facts.classes]


@every
def test_extends_goes_two_levels_at_most(name: str) -> None:
    levels, parent = 0, yaml.safe_load(find("recipe", name).read_text()).get("extends")
    while parent:
        assert parent.startswith("_"), "only files that are nothing but parents are extended"
        levels, parent = levels + 1, yaml.safe_load(find("recipe", parent).read_text()).get("extends")
    assert 1 <= levels <= MAX_LEVELS


# --- heads


@every
def test_the_head_opens_with_one_sentence(name: str) -> None:
    first = headline(shipped("recipe")[name])
    assert first.endswith(".") and len(first) <= 100
    assert first == told(name).splitlines()[0] and told(name).splitlines()[1] == ""


@every
def test_the_head_names_command_paper_and_teachers(name: str) -> None:
    text = told(name)
    assert f"\n  robustkd distill --recipe {name}\n" in text
    assert re.search(r"^Paper: .+\.$", text, re.M)
    said = re.search(r"^Teachers?: (.+)\.$", text, re.M)
    assert said
    ids = [str(teacher.id) for teacher in recipe(name).teachers]
    assert said[1].partition(";")[0] == (" and ".join(ids) or "none")


TARGET = re.compile(
    r"^Target \(published, not measured here\): clean (\d\d\.\d\d) / FGSM (\d\d\.\d\d) / PGD (\d\d\.\d\d) / "
    r"CW (\d\d\.\d\d) / AA (\d\d\.\d\d) %; DGAD paper('s rerun)?\.$",
    re.M,
)
NO_TARGET = "Target: none, no published row is verified."
RELAYED = {"b-mtard-rn18", "b-mtard-rn18-cifar100"}
UNVERIFIED = {"mart", "mtard", "b-mtard", "advfunmatch", "kd", "saad"}


@every
def test_the_head_has_the_published_row_or_says_that_there_is_none(name: str) -> None:
    text, method = told(name), split(name)[0]
    if name in RELAYED:
        assert re.search(r"^Target \(published, not measured here\): clean .+; as later papers relay it\.$", text, re.M)
        return
    row = TARGET.search(text)
    assert (row is None) == (method in UNVERIFIED) == (NO_TARGET in text)
    if row is not None:
        clean, fgsm, pgd, cw, aa = map(float, row.groups()[:5])
        assert clean > cw > fgsm > pgd > aa, "CW is the unlimited L2 attack, weaker than FGSM"
        assert (row[6] is None) == (method in ("adaad", "dgad"))


def test_the_headline_recipe() -> None:
    text, plan = told("dgad-mnv2"), recipe("dgad-mnv2")
    assert "clean 85.30 / FGSM 61.20 / PGD 56.77 / CW 80.98 / AA 51.10 %" in text and "headline" in text
    assert [teacher.id for teacher in plan.teachers] == ["ltd-wrn34-20-cifar10"]
    assert plan.method.model_dump() | {"beta": 10, "kl_scale": 0.5} == plan.method.model_dump()


@every
def test_the_cost_in_the_head_is_that_of_the_recipe(name: str) -> None:
    """Counted anew: passes of the method in one step of training, times the multiply-accumulates of each network."""
    said = re.search(r"^Cost: (.+)\.$", told(name), re.M)
    assert said is not None and said[1] == cost_line(recipe(name))


def test_multiply_accumulates_are_those_of_the_specification() -> None:
    expected = {"dgad-rn18": 0.5554, "dgad-mnv2": 0.09115}
    for name, giga in expected.items():
        assert giga_macs(recipe(name).student, (3, 32, 32), 10) == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("pgd-at-rn18", 13), ("ard-rn18", 41), ("adaad-rn18", 600), ("dgad-mnv2", 588)])
def test_costs_are_near_those_of_the_specification(name: str, expected: float) -> None:
    assert float(cost_line(recipe(name)).split()[0]) == pytest.approx(expected, rel=0.03)


# --- settings of the papers


def rates(plan: Recipe) -> dict[int, float]:
    """The first epoch of each learning rate."""
    found: dict[int, float] = {}
    for epoch in range(plan.train.epochs):
        value = rate(plan.train.schedule, plan.train.lr, epoch=epoch, epochs=plan.train.epochs)
        if not found or list(found.values())[-1] != pytest.approx(value):
            found[epoch] = value
    return found


#: methods.md 1.5 and 3.3: epochs, weight decay, 0-based first epochs of each learning rate
ADAAD200 = (200, 5e-4, {0: 0.1, 100: 0.01, 150: 0.001})
RSLAD300 = (300, 2e-4, {0: 0.1, 215: 0.01, 260: 0.001, 285: 0.0001})
ARD200 = (200, 2e-4, {0: 0.1, 100: 0.01, 150: 0.001})
SCHEDULES = {
    "pgd-at": (110, 5e-4, {0: 0.1, 100: 0.01, 105: 0.001}),
    "mart": (120, 3.5e-3, {0: 0.01, 74: 0.001, 89: 0.0001, 99: 0.00001}),
    **dict.fromkeys(("trades", "akd", "adaad", "dgad", "advfunmatch", "kd"), ADAAD200),
    **dict.fromkeys(("rslad", "mtard", "b-mtard"), RSLAD300),
    **dict.fromkeys(("ard", "iad"), ARD200),
    "saad": (200, 2e-4, ADAAD200[2]),
}


@every
def test_optimiser_and_schedule(name: str) -> None:
    method, plan = split(name)[0], recipe(name)
    epochs, decay, expected = SCHEDULES[method]
    assert (plan.train.epochs, plan.train.weight_decay) == (epochs, pytest.approx(decay))
    assert (plan.train.momentum, plan.train.nesterov) == (0.9, False)
    found = rates(plan)
    assert list(found) == list(expected) and list(found.values()) == pytest.approx(list(expected.values()))
    assert plan.train.batch_size == (256 if method == "ard" and plan.dataset.name == "cifar100" else 128)


@every
def test_the_attack_in_training(name: str) -> None:
    method, plan = split(name)[0], recipe(name)
    eps, step = (0.031, 0.007) if method == "mart" else (8 / 255, 2 / 255)
    assert plan.inner.steps == 10 and plan.inner.step_size == pytest.approx(step)
    assert plan.search_threat().eps == pytest.approx(eps)
    assert plan.inner.start is None and plan.inner.batch_norm is None, "left to the method"


#: knobs that depend on student or data set (methods.md 4.2, 4.3, 4.6, 5.1)
KNOBS = {
    "dgad-rn18": {"beta": 5, "kl_scale": 1},
    "dgad-rn18-cifar100": {"beta": 5, "kl_scale": 1},
    "dgad-mnv2-cifar100": {"beta": 10, "kl_scale": 0.5},
    "dgad-rn18-tiny": {"beta": 15, "kl_scale": 1},
    "trades-mnv2": {"beta": 6},
    "mart-rn18": {"beta": 5},
    "ard-rn18": {"alpha": 1, "tau": 30, "reduction": "emean"},
    "iad-rn18": {"form": "iad-1", "tau": 1, "gate_epoch": 60},
    "iad-mnv2-cifar100": {"gate_epoch": 80},
    "adaad-rn18": {"alpha": 1},
    **{
        f"{m}-{s}{d}": {"scale": 10 if d else 1}
        for m in ("rslad", "mtard", "b-mtard")
        for s in STUDENTS
        for d in ("", "-cifar100")
    },
}


@pytest.mark.parametrize("name", KNOBS)
def test_knobs(name: str) -> None:
    plan = recipe(name).method.model_dump()
    assert {key: plan[key] for key in KNOBS[name]} == KNOBS[name]


@every
def test_augmentation_selection_and_seed(name: str) -> None:
    method, plan = split(name)[0], recipe(name)
    strong = ("autoaugment",) if method == "advfunmatch" else ()
    assert plan.train.augment == ("crop", "flip", *strong) and plan.train.pad == 4
    assert plan.train.select == {"b-mtard": "weighted", "kd": "clean"}.get(method, "pgd10")
    assert plan.seed == (42 if method in ("adaad", "dgad") else 0)


@every
def test_only_saad_averages_its_weights(name: str) -> None:
    average = recipe(name).addons.average
    assert (average and (average.name, average.start_epoch)) == (("swa", 95) if split(name)[0] == "saad" else None)


def test_the_document_lists_them_all() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in text] == []


def test_the_recipes_a_document_gives_for_teachers_build_the_networks_of_their_cards(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S) if "extends: _" in block]
    cards = ("trades-preactresnet18-tiny-imagenet", "clean-wrn22-6-cifar100")
    for block, name in zip(blocks, cards, strict=True):
        (tmp_path / "mine.yaml").write_text(block)
        plan, card = load_recipe(tmp_path / "mine.yaml"), read_card(name)
        assert (plan.student, plan.dataset.name) == (card.model, card.dataset)


def test_parents_are_no_recipes() -> None:
    parents = [file.stem for file in Path(find("recipe", "dgad-mnv2")).parent.glob("_*.yaml")]
    assert {"_cifar10", "_cifar100", "_tiny"} <= set(parents) and not set(parents) & set(shipped("recipe"))
