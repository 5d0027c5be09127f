"""What `show recipe` says a run costs: counted, held against the published counts, and silent where nothing is known."""

import json

import pytest
from safetensors.torch import save_file

from robustkd.bundle import ModelInfo, create
from robustkd.errors import ArtifactError
from robustkd.models._files import portable
from robustkd.models._macs import giga_macs
from robustkd.recipe.reading import override, read, validate
from robustkd.recipe.schema import Recipe
from robustkd.threat import ThreatModel
from robustkd.training.cost import images_of, parts_of, told
from robustkd.training.rate import measured

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


def trained(folder, *, speeds=(1.0, 100.0, 300.0, 200.0), hardware=None):
    """A checkpoint of the quickstart as distill leaves it, that logged these images per second."""
    student = recipe("quickstart").student
    info = ModelInfo(architecture="resnet18", classes=tuple(map(str, range(10))), input_shape=(1, 28, 28))
    told = {"hardware": hardware or {"device": "cpu", "cpu": "a processor"}, "training": {"threads": 2, "processes": 3}}
    resolved = recipe("quickstart").model_dump(mode="json")
    with create(folder, "checkpoint", recipe=resolved, model=info, threat=ThreatModel(), **told) as (work, _):
        save_file(portable(student.build(channels=1, classes=10)), work / "model.safetensors")
        lines = [{"step": i, "images_per_s": v} for i, v in enumerate(speeds)] + [{"epoch": 0, "clean_accuracy": 0.5}]
        (work / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_hours_are_told_at_the_rate_of_a_run(tmp_path):
    rate = measured(trained(tmp_path / "run"))
    assert rate.gmacs_per_s == pytest.approx(200 * total("quickstart")), "the first line warms up"
    assert rate.machine == "a processor, threads: 2, processes: 3"
    (hours,) = [line for line in told(recipe("quickstart"), "quickstart", rate) if line.startswith("hours: ")]
    assert float(hours.split()[1]) == pytest.approx(57_000 / 200 / 3600, rel=0.01)
    other = told(recipe("dgad-rn18"), "dgad-rn18", rate)[2]
    assert float(other.split()[1]) == pytest.approx(total("dgad-rn18") * 9_800_000 / rate.gmacs_per_s / 3600, rel=0.01)


def test_a_gpu_is_named_and_one_line_is_enough(tmp_path):
    found = measured(trained(tmp_path / "run", speeds=(50.0,), hardware={"device": "Some GPU", "cpu": "a processor"}))
    assert found.machine == "Some GPU, processes: 3" and found.gmacs_per_s == pytest.approx(50 * total("quickstart"))


def test_show_tells_the_hours(cli, tmp_path):
    done = cli("show", "recipe", "dgad-mnv2", "--measured", trained(tmp_path / "run"))
    assert done.code == 0 and "GMACs a second of" in done.stdout
    assert cli("show", "target", "cpu-fp32", "--measured", tmp_path).code == 3


def test_a_checkpoint_without_a_speed_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no measured speed"):
        measured(trained(tmp_path / "run", speeds=()))
    with pytest.raises(ArtifactError):
        measured(tmp_path / "nothing")
