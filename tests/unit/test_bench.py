"""The benchmarks' mathematics and the form of their results; nothing here depends on speed."""

import json
import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench.__main__ as command
from bench import audit, breakdown, engine, peaks, shards, sizes, startup, step
from bench.place import Place
from bench.reference.steps import STEPS
from bench.reference.tools import on_labels, update
from bench.timing import interleave
from robustkd.catalog import Shelf
from robustkd.methods._cost import cost_of
from robustkd.models._macs import giga_macs

TINY = sizes.tiny(sizes.QUICKSTART)
PAPER = sizes.tiny(sizes.paper("mnv2", "wrn-34-10"))


@pytest.mark.parametrize("name", STEPS)
def test_the_reference_takes_the_same_steps_as_our_loop(name, tmp_path):
    pair = step.Pair(name, TINY, tmp_path, dtype=torch.float64)
    before = {key: value.clone() for key, value in pair.student.state_dict().items()}
    assert pair.check() <= step.TOLERANCE
    ours, reference = pair.loop.student.state_dict(), pair.student.state_dict()
    for key, value in reference.items():
        assert torch.allclose(ours[key], value, atol=1e-8, rtol=1e-6), key
    assert not torch.equal(reference["conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize("name", ["dgad", "trades", "mtard", "saad"])
def test_so_they_do_on_the_families_of_the_papers(name, tmp_path):
    assert step.Pair(name, PAPER, tmp_path, dtype=torch.float64).check() <= step.TOLERANCE


def test_the_loops_attack_is_the_references_where_it_runs_in_train_mode(tmp_path):
    """ARD and IAD: ten more updates of the running statistics for a batch, which a wrong mode would lose."""
    pair = step.Pair("ard", TINY, tmp_path, dtype=torch.float64)
    pair.check()
    assert int(pair.student.state_dict()["bn1.num_batches_tracked"]) == 2 * (TINY.steps + 2)


@pytest.mark.parametrize(("name", "other"), [("dgad", "adaad"), ("ard", "rslad"), ("mtard", "b-mtard"), ("pgd-at", "mart")])
def test_another_loss_is_found_before_anything_is_timed(name, other, tmp_path):
    pair = step.Pair(name, TINY, tmp_path, dtype=torch.float64)
    pair.plain = STEPS[other]
    with pytest.raises(step.Different, match="nothing was timed"):
        pair.check()


def test_other_running_statistics_are_found_though_the_first_loss_be_the_same(tmp_path):
    """PGD-AT without the clean pass that only running statistics see."""
    pair = step.Pair("pgd-at", TINY, tmp_path, dtype=torch.float64)
    pair.plain = lambda s, x, y, noise: update(s, F.cross_entropy(s.student(on_labels(s, x, y, noise)), y))
    pair.ours(), pair.reference()
    ours, reference = pair.loop.student.state_dict(), pair.student.state_dict()
    assert torch.allclose(ours["conv1.weight"], reference["conv1.weight"], atol=1e-12)
    with pytest.raises(step.Different, match="nothing was timed"):
        pair.check()


def test_every_method_on_the_shelf_has_a_reference():
    assert set(STEPS) == set(Shelf("methods").names())


def test_samples_alternate_and_the_ratio_is_of_the_medians(monkeypatch):
    calls = []
    clock = iter([0, 1, 1, 3, 3, 4, 4, 10, 10, 11, 11, 14])  # ours 1, 1, 1; reference 2, 6, 3
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: next(clock))
    row = interleave("case", lambda: calls.append("a"), lambda: calls.append("b"), pairs=3)
    assert "".join(calls) == "abababab"
    assert (row["ratio"], row["ours"], row["reference"], row["ratio_range"]) == (3, 1, 3, [2, 6])


def test_what_makes_ready_comes_before_each_sample_untimed(monkeypatch):
    calls = []
    clock = iter([0, 1, 1, 3])
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: calls.append("t") or next(clock))
    ready = (lambda: calls.append("A"), lambda: calls.append("B"))
    interleave("case", lambda: calls.append("a"), lambda: calls.append("b"), pairs=1, warm=0, ready=ready)
    assert "".join(calls) == "AtatBtbt"


def test_json_is_one_object_of_the_promised_form(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(startup, "CASES", {"help": (["--version"], ["nothing"])})
    monkeypatch.setattr(startup, "call", lambda arguments: sys.stderr.write("called\n"))
    threads = torch.get_num_threads()
    assert command.main(["startup", "--quick", "--json"]) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"rows", "environment"}
    assert found["environment"]["left_out"] == {}
    assert found["rows"][0]["case"] == "startup/help"
    assert all(isinstance(row[key], float) and row[key] > 0 for row in found["rows"] for key in ("ratio", "ours", "reference"))
    assert {"hardware", "versions", "threads", "load_before", "quick"} <= found["environment"].keys()
    assert json.loads((tmp_path / "results" / "startup.json").read_text()) == found


def test_cases_name_method_student_and_teacher():
    full = [step.case_of(*case) for case in step.cases(quick=False)]
    assert {"dgad/resnet18-w0.125/resnet18-w0.25", "pgd-at/resnet18-w0.125", "pgd-at/mnv2"} <= set(full)
    assert {f"saad/{s}/{t}" for s in ("mnv2", "rn18") for t in ("wrn-34-10", "resnet-18")} <= set(full)
    assert len(full) == len(set(full))
    quick = [step.case_of(*case) for case in step.cases(quick=True)]
    assert set(quick) < set(full) and "dgad/mnv2/wrn-34-10" in quick and "adaad/mnv2/wrn-34-10" not in quick


def test_sizes_of_the_papers_are_theirs():
    """Counts of parameters from the papers' definitions."""
    size = sizes.paper("mnv2", "wrn-34-10")
    models = step.recipe_for("mtard", size)
    assert (size.channels, size.pixels, size.steps, size.step_size) == (3, 32, 10, "2/255")
    with torch.device("meta"):
        nets = [models.student, *(teacher.model for teacher in models.teachers)]
        counts = [sum(p.numel() for p in net.build(channels=3, classes=10).parameters()) for net in nets]
    assert counts[:2] == [2_296_922, 46_160_474]
    assert counts[2] < 10**6


def test_only_the_cases_asked_for_are_timed(monkeypatch):
    monkeypatch.setattr(step, "QUICKSTART", TINY)
    (row,) = step.rows(quick=True, place=Place(only=("standard/*w0.125", "nothing/*")))
    assert row["case"] == "standard/resnet18-w0.125"
    assert row["ratio"] > 0 and row["batch"] == TINY.batch and row["device"] == "cpu"


def test_the_timed_commands_work():
    startup.call([startup.EMPTY, "nothing"])
    startup.call(["-m", "robustkd", "--version"])


def test_batch_and_pairs_are_what_is_asked_for(monkeypatch, tmp_path):
    assert {size.batch for _, size in step.cases(quick=True, batch=4) if size is not sizes.QUICKSTART} == {4}
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(step, "QUICKSTART", TINY)
    threads = torch.get_num_threads()
    assert command.main(["step", "--pairs", "2", "--batch", "4", "--only", "standard/resnet18*"]) == 0
    torch.set_num_threads(threads)
    (row,) = json.loads((tmp_path / "step-4.json").read_text())["rows"]
    assert (row["pairs"], row["batch"]) == (2, TINY.batch), "the quickstart's own batch stays"


def test_cases_measured_by_themselves_join_those_that_were_measured_alike(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(
        command, "_rows", lambda name, quick, told: iter([{"case": told.get("only", "*")[0], "ratio": told["pairs"]}])
    )

    def run(case, ratio, **changes):
        told = {**dict.fromkeys(command.ALIKE, 1), "date": f"on {ratio}", **changes}
        monkeypatch.setattr(command, "environment", lambda **_: told)
        command.measure("step", quick=False, place={"pairs": ratio} | ({"only": (case,)} if case != "*" else {}))
        rows = json.loads((tmp_path / "step.json").read_text())["rows"]
        return [(row["case"], row["ratio"], row["date"]) for row in rows]

    assert run("a", 1) == [("a", 1, "on 1")]
    assert run("b", 2) == [("a", 1, "on 1"), ("b", 2, "on 2")]
    assert run("a", 3) == [("b", 2, "on 2"), ("a", 3, "on 3")]
    assert run("b", 4, threads=2) == [("b", 4, "on 4")], "measured elsewhere"
    assert run("*", 5, threads=2) == [("*", 5, "on 5")], "everything anew"


@pytest.mark.parametrize("option", [["--batch", "0"], ["--pairs", "-1"], ["--pairs", "many"]])
def test_a_number_that_is_none_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["step", *option])
    assert stopped.value.code == 2
    assert f"argument {option[0]}: invalid count value: '{option[1]}'" in capsys.readouterr().err


def test_results_of_another_place_do_not_replace_the_usual_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(step, "QUICKSTART", TINY)
    threads = torch.get_num_threads()
    assert command.main(["step", "--quick", "--speed", "safe", "--only", "standard/resnet18*"]) == 0
    torch.set_num_threads(threads)
    (file,) = tmp_path.glob("*.json")
    assert file.name == "step-safe.json"
    assert json.loads(file.read_text())["rows"][0]["speed"] == "safe"


@pytest.mark.parametrize("budget", [audit.PGD, audit.Budget("short", steps=3, targets=1, queries=10)], ids=lambda b: b.name)
def test_verdicts_are_compared_image_by_image(budget):
    sides = audit.Sides(budget, 12, 8)
    row = sides.row(pairs=1)
    robust = {side: found.robust for side, found in sides.outcomes.items()}
    differ = [i for i in range(12) if robust["ours"][i] != robust["reference"][i]]
    assert [told["image"] for told in row["differences"]] == differ
    assert row["verdicts_equal"] == 12 - len(differ)
    assert 0 < row["robust_ours"] <= int(sides.robust_clean().sum()) <= row["n"] == 12


def test_a_process_for_each_core_is_compared_on_the_same_images():
    jobs = audit.Jobs(audit.Budget("short", steps=3, targets=1, queries=10), 12, 4)
    jobs.jobs = 2
    jobs.ours()
    jobs.reference()
    ours, reference = jobs.outcomes["ours"], jobs.outcomes["reference"]
    assert 0 < ours.robust.sum() <= jobs.robust_clean().sum()
    assert np.abs(ours.x_adv - jobs.images.floats()).max() <= audit.THREAT.eps + 1e-6
    assert (ours.robust == reference.robust).mean() > 0.8


def test_the_standard_budget_is_that_of_the_package():
    from pyautoattack import AutoAttack

    usual = AutoAttack(torch.nn.Identity(), eps=0.1, version="standard")
    policy = audit.STANDARD.policy
    assert policy.apgd_steps == usual.apgd.n_iter == usual.apgd_targeted.n_iter
    assert policy.targets == usual.apgd_targeted.n_target_classes == usual.fab.n_target_classes
    assert policy.square_queries == usual.square.n_queries and usual.apgd.n_restarts == policy.restarts
    assert usual.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"] and policy.fab
    assert not (policy.noise_draws or policy.pgd_steps or policy.ladder_images or policy.memory_images)


def test_an_image_that_one_side_breaks_is_told_with_its_margin():
    """The source's adversarial images, handed in as what one side found."""
    sides = audit.Sides(audit.PGD, 40, 40)
    sides.reference()
    found = sides.outcomes["reference"]
    broken = int((sides.robust_clean() & ~found.robust).nonzero()[0][0])
    blind = audit.Outcome(sides.robust_clean(), sides.images.floats())
    sides.outcomes["ours"] = blind
    told = {entry["image"]: entry for entry in sides.verdicts()["differences"]}[broken]
    assert told["broken_by"] == "reference" and told["margin"] < 0 and "did not" in told["why"]


def test_engines_take_turns_and_percentiles_need_samples(tmp_path):
    mini = {"name": "resnet18", "width": 0.0625}
    made = engine.engines(mini, tmp_path, Place())
    ready = {name: found for name, found in made.items() if not isinstance(found, str) and name != engine.COMPILED}
    assert {engine.EAGER, "onnxruntime-fp32", "onnxruntime-fp16", "onnxruntime-int8"} <= set(ready)
    images = np.random.default_rng(1).random((8, *engine.SHAPE), dtype=np.float32)
    eager = ready[engine.EAGER].logits(images)
    assert np.abs(ready["onnxruntime-fp32"].logits(images) - eager).max() < 1e-4
    rows = {row["case"]: row for row in engine._rows("engine/mini", ready, 2, engine.turns(ready, 2, 20))}
    assert rows["engine/mini/torch-eager/b2"]["ratio"] == 1
    row = rows["engine/mini/onnxruntime-int8/b2"]
    assert row["latency_ms"]["p95"] >= row["latency_ms"]["p50"] > 0 and row["latency_ms"]["p99"] is None
    assert row["engine"]["precision"] == "int8" and row["images_per_s"] > 0
    assert row["cpu_ms"]["median"] >= row["cpu_ms"]["least"] > 0 and row["cpu_ratio"] > 0


def test_what_cannot_be_had_here_is_left_out_with_its_reason(monkeypatch, tmp_path, capsys):
    def rows(*, quick, place):
        yield {"case": "engine/mini/tensorrt", "left_out": "no GPU"}

    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(engine, "rows", rows)
    threads = torch.get_num_threads()
    assert command.main(["engine", "--json"]) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == [] and found["environment"]["left_out"] == {"engine/mini/tensorrt": "no GPU"}


def test_memory_is_measured_over_batch_sizes_and_numbers_of_images():
    full = {peaks.name_of(case) for case in peaks.cases(quick=False)}
    assert {peaks.name_of(case) for case in peaks.cases(quick=True)} < full
    assert {"memory/step/dgad/mnv2/resnet-18/b16", "memory/step/dgad/mnv2/resnet-18/b128"} < full
    assert {"memory/audit/resnet-18/n64/b64", "memory/audit/resnet-18/n1024/b64"} < full


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process begins anew only on Linux")
def test_a_larger_batch_needs_more_memory():
    told = {"device": "cpu", "precision": "fp32", "speed": "auto", "kind": "step", "student": "mnv2", "teacher": "resnet-18"}
    small, large = (peaks.measured({**told, "batch": batch})["ours"] for batch in (2, 6))
    assert large > 1.5 * small


def counted(method):
    """Work of each part over the network's own, from the breakdown of one step."""
    size = replace(TINY, batch=4, steps=3)
    found = breakdown.rows(method, size, Place(), 2)
    shape = (size.channels, size.pixels, size.pixels)
    recipe = step.recipe_for(method, size)
    nets = {"student": recipe.student} | ({"teacher": recipe.teachers[0].model} if recipe.teachers else {})
    whole = {name: size.batch * giga_macs(net, shape, 10) for name, net in nets.items()}
    parts = {row["case"].rpartition("/")[2]: row for row in found}
    assert sum(row["share"] for row in found) == pytest.approx(1) and all(row["seconds"] >= 0 for row in found)
    return {name: row["gmacs"] / whole[name.partition(" ")[0]] for name, row in parts.items() if row["gmacs"]}


@pytest.mark.parametrize("method", ["dgad", "trades", "pgd-at", "rslad"])
def test_the_parts_of_a_step_are_all_of_its_passes(method):
    cost = cost_of(method, steps=3, knobs={})
    found = counted(method)
    student = sum(value for name, value in found.items() if name.startswith("student"))
    teacher = sum(value for name, value in found.items() if name.startswith("teacher"))
    assert student == pytest.approx(cost.student)
    assert teacher == pytest.approx(sum(cost.teachers.values()))
    assert ("teacher backward to the images" in found) == (method == "dgad")


def test_a_breakdown_leaves_the_loop_as_it_was(tmp_path):
    pair = step.Pair("dgad", TINY, tmp_path)
    backward, update = pair.loop.team.backward, pair.loop.optimizer.step
    with breakdown.Marks(lambda: None).on(pair):
        assert pair.loop.optimizer.step != update
    assert (pair.loop.team.backward, pair.loop.optimizer.step) == (backward, update)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.loop.student.modules())


@pytest.mark.parametrize("case", ["dgad/vgg/resnet-18", "dgad/mnv2/vgg", "dgad"])
def test_a_breakdown_of_unknown_networks_is_refused(case):
    with pytest.raises(SystemExit, match="is not method/student/teacher"):
        breakdown.parse(case, "cpu")


def test_two_shards_find_what_the_whole_finds(monkeypatch):
    short = "noise_draws: 1\npgd_steps: 1\napgd_steps: 0\ntargets: 0\nsquare_queries: 0\nuint8: none\n"
    monkeypatch.setattr(shards, "POLICY", short + "ladder_images: 0\nscale_images: 0\nmemory_images: 0\nfresh_process: false\n")
    monkeypatch.setattr(shards, "CHUNK", 80)  # 160 images: a whole chunk of 128, and the rest
    (row,) = shards.rows(quick=True)
    assert row["case"] == "shards/2/resnet-18" and row["n"] == 160 and row["equal"] and row["ratio"] > 0


def documented():
    """The benchmark lines of the page on performance, and those of the script for GPUs."""
    page = (startup.ROOT / "docs" / "performance.md").read_text()
    lines = [line.partition("#")[0].strip() for line in page.splitlines() if line.startswith("python -m bench")]
    script = (startup.ROOT / "bench" / "gpu.sh").read_text().replace("$gpu", "--device cuda")
    parts = [line.split(" ", 2)[2] for line in map(str.strip, script.splitlines()) if line.startswith("part ")]
    return [line.removeprefix("python -m bench") for line in lines] + parts


@pytest.mark.parametrize("line", documented())
def test_every_documented_benchmark_can_be_asked_for(line):
    words = shlex.split(line)
    if words[:1] == ["breakdown"]:
        assert breakdown.parse(words[words.index("--case") + 1], "cpu")
        return
    asked = command._parser().parse_args(words)
    wanted = Place(only=tuple(asked.only or ("*",)))
    if asked.name == "step":
        assert any(wanted.wants(step.case_of(*case)) for case in step.cases(quick=asked.quick))
    if asked.name == "memory":
        assert any(wanted.wants(peaks.name_of(case)) for case in peaks.cases(quick=asked.quick))


def test_the_script_for_gpus_stays_below_nine_minutes():
    script = (startup.ROOT / "bench" / "gpu.sh").read_text()
    limits = [int(line.split()[1]) for line in script.splitlines() if line.startswith("part ")]  # those of --dry are indented
    assert len(limits) > 5 and sum(limits) < 9 * 60
