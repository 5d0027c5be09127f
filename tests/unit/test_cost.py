"""What `show recipe` says a run costs: counted, held against the published counts, and silent where nothing is known."""

import pytest

from robustkd.models._macs import giga_macs
from robustkd.recipe.reading import override, read, validate
from robustkd.recipe.schema import Recipe
from robustkd.training.cost import images_of, parts_of, told

WRN = "teachers=[{role: robust, id: ltd-wrn34-10-cifar10}]"


def recipe(name, *settings):
    return validate(Recipe, override(read("recipe", name), settings))


def total(name, *settings):
    return sum(part.passes * part.gmacs for part in parts_of(recipe(name, *settings)))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [  # methods.md, section 1.7
        ("pgd-at-rn18", [], 13),
        ("rslad-rn18", [WRN], 21),
        ("dgad-rn18", [WRN], 161),
        ("dgad-mnv2", [WRN], 149),
        ("adaad-rn18", [], 600),
    ],
)
def test_costs_are_those_of_the_specification(name, settings, expected):
    assert total(name, *settings) == pytest.approx(expected, rel=0.03)


def test_more_attack_steps_cost_more_and_knobs_count():
    assert total("pgd-at-rn18", "inner.steps=20") == pytest.approx(total("pgd-at-rn18") * 44 / 24, rel=0.05)
    assert total("adaad-rn18", "method.clean_bn_pass=false") < total("adaad-rn18")


def test_images_are_counted_without_those_held_out():
    assert images_of(recipe("pgd-at-rn18")) == (110 * 49_000, "110 epochs of 49,000")
    assert images_of(recipe("pgd-at-rn18", "dataset.train_n=100", "train.epochs=3")) == (300, "3 epochs of 100")
    assert images_of(recipe("quickstart")) == (6 * 9_500, "6 epochs of 9,500")


def test_of_a_folder_nothing_is_known_before_it_is_read(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    unread = Recipe.model_validate(
        {"dataset": {"name": "folder", "path": str(tmp_path)}, "student": "resnet18", "method": "pgd-at"}
    )
    assert images_of(unread) is None
    (line,) = told(unread, "mine")
    assert line == "cost: not counted: the images of folder are known once they are read"


def test_no_hours_are_promised():
    lines = told(recipe("dgad-rn18"), "dgad-rn18")
    assert "to be measured" in lines[2] and "robustkd distill --recipe dgad-rn18" in lines[3]
    assert not any("hours:" in line and any(c.isdigit() for c in line.replace("3600", "")) for line in lines)


def test_the_count_leaves_no_weights_behind():
    from robustkd.catalog import Shelf

    wide = Shelf("models").get("wide-resnet")(depth=34, widen_factor=20)
    assert giga_macs(wide, (3, 32, 32), 10) == pytest.approx(26.6, rel=0.01)
