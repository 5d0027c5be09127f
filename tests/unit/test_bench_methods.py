"""bench.methods: what its table says of given flags, what it refuses, and one real run that is not run twice."""

import json

import pytest

from bench import methods
from bench._methods_page import page
from bench._methods_plan import YARDSTICK, Row, Setting, choose, clean_recipe, recipe_for, rows
from bench._methods_run import MEASURED, train
from bench._methods_table import costs, lines, table, with_interval
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError, ConfigError
from robustkd.methods._cost import cost_of
from robustkd.training.verb import WORK

SETTING = Setting(epochs=1, n=8, attack_n=4)


def measured(label, seed, autoattack, *, clean="11111110", seconds=0.1, **changes):
    """A measured.json as the bench writes it."""
    recipe = recipe_for(Row(label, label), seed, SETTING, "clean")
    return {
        "name": f"{label}-s{seed}",
        "label": label,
        "seed": seed,
        "note": "",
        "setting": SETTING.plain(),
        "load_before": 0.5,
        "hardware": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2.0", "robustkd": "1.0"},
        "seconds_per_step": seconds,
        "cost": {"student": 7, "teachers": {}},
        "recipe": recipe.model_dump(mode="json"),
        "flags": {"clean": clean, "pgd-20": "11110000", "autoattack": autoattack},
        **changes,
    }


def test_lines_are_means_over_seeds_sorted_by_autoattack():
    runs = [measured("trades", s, flags) for s, flags in enumerate(("1100", "1000"))]
    runs += [measured("pgd-at", s, "1110") for s in (0, 1)]
    best, other = lines(runs)
    assert (best.label, best.seeds, best.mean("autoattack"), best.paired) == ("pgd-at", (0, 1), 0.75, None)
    assert (other.label, other.mean("autoattack"), other.mean("clean")) == ("trades", 0.375, 0.875)
    assert other.accuracy["autoattack"] == (0.5, 0.25)


def test_pairs_are_of_the_same_image_and_seed_and_images_count_once():
    runs = [measured("pgd-at", s, "1110") for s in (0, 1, 2)] + [measured("mart", s, "0111") for s in (0, 1, 2)]
    pair = next(line.paired for line in lines(runs) if line.label == "mart")
    assert (pair.b, pair.c, pair.p) == (3, 3, 1)
    assert (pair.b_images, pair.c_images, pair.p_images) == (1, 1, 1)
    runs[-1] = measured("mart", 5, "0000")  # a seed the yardstick lacks is no pair
    pair = next(line.paired for line in lines(runs) if line.label == "mart")
    assert (pair.b, pair.c) == (2, 2)


def test_the_ratio_of_times_is_of_the_same_seed():
    runs = [measured("pgd-at", s, "1111", seconds=t) for s, t in enumerate((0.1, 0.4))]
    runs += [measured("trades", s, "1111", seconds=t) for s, t in enumerate((0.2, 0.8))]
    assert {line.label: line.ratio for line in lines(runs)} == {"pgd-at": 1, "trades": 2}


def test_the_table_has_a_cell_for_each_head_and_shows_intervals():
    runs = [measured(label, 0, flags) for label, flags in (("pgd-at", "1111"), ("standard", "0000"))]
    head, rule, first, last = table(lines(runs)).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == last.count("|")
    assert "| 100.0 (51.0 to 100.0) |" in first
    assert "| -100.0 | 4 / 0 (p 0.125) | 4 / 0 (p 0.125) |" in last


def test_costs_are_counted_passes_and_times_the_cheapest_first():
    runs = [measured("pgd-at", 0, "1111"), measured("standard", 0, "0000", seconds=0.025)]
    assert costs(lines(runs)).splitlines()[2:] == [
        "| standard | student 7 | 25 | 0.25 |",
        "| pgd-at | student 7 | 100 | 1.00 |",
    ]


def test_methods_that_average_over_classes_are_named_and_the_control_only_where_it_ran():
    runs = [measured(label, 0, "1111") for label in ("pgd-at", "rslad", "adaad")]
    text = page(runs, "", missing=[], failed={})
    assert "The KL terms of adaad, rslad are averaged" in text
    assert "adaad-bmean" not in text
    assert "KL terms" not in page(runs[:1], "", missing=[], failed={})


def test_the_interval_is_around_the_mean_also_where_it_is_no_whole_count():
    assert with_interval(0.75, 2) == "75.0 (19.8 to 97.3)"
    assert with_interval(1.0, 10**6) == "100.0 (100.0 to 100.0)"


def test_without_the_yardstick_nothing_is_compared():
    (line,) = lines([measured("trades", 0, "1111")])
    assert line.paired is None
    assert line.ratio is None
    assert "Bonferroni" not in page([measured("trades", 0, "1111")], "make", missing=[], failed={})


def test_the_page_names_setting_machine_and_what_is_missing():
    runs = [measured("pgd-at", 0, "1111"), measured("standard", 1, "0000", note="a note")]
    text = page(runs, "python -m bench.methods", missing=["mart-s0", "kd-s0"], failed={"kd-s0": "training diverged"})
    for part in ("a CPU, 2 cores", "torch 2.0", "Seeds 0, 1", "python -m bench.methods", "`standard`: a note"):
        assert part in text
    assert "- `mart-s0`: not run\n- `kd-s0`: training diverged\n" in text
    assert "without fab-t; the standard square has 5000 queries" in text


def test_the_whole_set_is_called_standard_and_nothing_less_is():
    whole = Setting(attacks=("apgd-ce", "apgd-t", "fab-t", "square"), queries=5000)
    assert "the standard set of AutoAttack in turn" in page(
        [measured("pgd-at", 0, "1111", setting=whole.plain())], "", missing=[], failed={}
    )
    less = Setting(attacks=("apgd-ce", "apgd-t", "fab-t", "square"), queries=4999)
    assert "a part of the standard set" in page(
        [measured("pgd-at", 0, "1111", setting=less.plain())], "", missing=[], failed={}
    )


@pytest.mark.parametrize("label", rows(4))
def test_every_row_searches_the_same_ball_on_the_same_student(label, tmp_path):
    (row,) = choose([label], 4)
    recipe, yard = (recipe_for(r, 1, Setting(), tmp_path) for r in (row, Row(YARDSTICK, YARDSTICK)))
    assert (recipe.student, recipe.dataset, recipe.threat, recipe.inner) == (
        yard.student,
        yard.dataset,
        yard.threat,
        yard.inner,
    )
    assert recipe.search_threat() == recipe.threat
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.batch_size, recipe.seed) == (4, yard.train.lr, 64, 1)


def test_every_method_of_the_shelf_has_a_row_and_the_yardstick_runs_first():
    assert set(Shelf("methods").names()) <= set(rows(4))
    assert choose(rows(4), 4)[0].label == YARDSTICK
    with pytest.raises(ConfigError, match="neither a method nor a form of one"):
        choose(["pgdat"], 4)


def test_the_clean_teacher_has_the_robust_ones_architecture():
    recipe = clean_recipe(Setting())
    assert (recipe.method.name, recipe.student.width, recipe.train.select) == ("standard", 0.25, "clean")


def test_a_folder_holds_runs_of_one_setting(tmp_path):
    methods.agree(tmp_path, SETTING)
    methods.agree(tmp_path, Setting.read(SETTING.plain()))
    with pytest.raises(ArtifactError, match=r"another setting \(epochs\)"):
        methods.agree(tmp_path, Setting(epochs=2, n=8, attack_n=4))


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--attacks", "pgd"), ("--methods", "nonsense")])
def test_wrong_options_are_refused_before_anything_runs(option, tmp_path, capsys):
    assert methods.main(["--output", str(tmp_path / "runs"), *option]) == ConfigError.exit_code
    assert not (tmp_path / "runs").exists()


def test_the_command_names_what_differs_from_the_defaults_and_no_folder_of_this_machine(tmp_path):
    asked = methods.parser().parse_args(["--output", str(tmp_path / "x"), "--seeds", "0,3", "--attack-n", "9", "--jobs", "1"])
    assert methods.command_of(asked) == "python -m bench.methods --output runs/x --seeds 0,3 --attack-n 9"


def test_half_a_training_of_another_recipe_is_begun_anew(tmp_path):
    tiny = Setting(epochs=1, train_n=2)
    recipe = recipe_for(Row("standard", "standard"), 0, tiny, tmp_path)
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "recipe.json").write_text(json.dumps({**recipe.model_dump(mode="json"), "seed": 7}))
    assert train(recipe, tmp_path).manifest.recipe["seed"] == 0
    assert train(recipe, tmp_path).manifest.recipe["seed"] == 0  # finished: opened, not trained again


def test_one_real_run_is_measured_and_then_skipped(tmp_path, capsys):
    options = ["--methods", "pgd-at", "--seeds", "0", "--epochs", "1", "--train-n", "64", "--n", "16", "--attack-n", "8"]
    options += ["--attacks", "apgd-ce,square", "--queries", "20", "--page", str(tmp_path / "page.md")]
    assert methods.main(["--output", str(tmp_path / "runs"), *options]) == 0
    file = tmp_path / "runs" / "pgd-at-s0" / MEASURED
    found = json.loads(file.read_bytes())
    lengths = {name: len(flags) for name, flags in found["flags"].items()}
    assert lengths == {"clean": 16, "pgd-20": 16, "apgd-ce": 8, "square": 8, "autoattack": 8}
    assert all(left <= before for left, before in zip(found["flags"]["autoattack"], found["flags"]["clean"], strict=False))
    assert found["seconds_per_step"] > 0
    assert found["cost"]["student"] == cost_of("pgd-at", steps=2).student
    text, written = (tmp_path / "page.md").read_text(), file.stat().st_mtime_ns
    assert "pgd-at" in capsys.readouterr().out
    assert "apgd-ce (steps 100), square (queries 20), without apgd-t and fab-t" in text
    assert str(tmp_path) not in text
    assert methods.main(["--output", str(tmp_path / "runs"), *options]) == 0
    assert "started" not in capsys.readouterr().err
    assert file.stat().st_mtime_ns == written
    assert (tmp_path / "page.md").read_text() == text
