"""The benchmarks' mathematics and the form of their results; nothing here depends on speed."""

import json
import sys

import pytest
import torch

import bench.__main__ as command
from bench import startup, step
from bench.reference.steps import STEPS
from bench.timing import interleave
from robustkd.catalog import Shelf

TINY = step.Size(student=0.0625, teacher=0.125, pixels=12, batch=16, steps=3)


@pytest.mark.parametrize("name", STEPS)
def test_the_reference_takes_the_same_step_as_our_loop(name, tmp_path):
    pair = step.Pair(name, TINY, tmp_path, dtype=torch.float64)
    assert pair.check() <= step.TOLERANCE
    ours, reference = pair.loop.student.state_dict(), pair.student.state_dict()
    for key, value in reference.items():
        assert torch.allclose(ours[key], value, atol=1e-8, rtol=1e-6), key


def test_another_loss_is_found_before_anything_is_timed(tmp_path):
    pair = step.Pair("dgad", TINY, tmp_path, dtype=torch.float64)
    pair.plain = STEPS["adaad"]
    with pytest.raises(step.Different, match="nothing was timed"):
        pair.check()


def test_every_reference_is_of_a_method_on_the_shelf():
    assert set(STEPS) <= set(Shelf("methods").names())


def test_samples_alternate_and_the_ratio_is_of_the_medians(monkeypatch):
    calls = []
    clock = iter([0, 1, 1, 3, 3, 4, 4, 10, 10, 11, 11, 14])  # ours 1, 1, 1; reference 2, 6, 3
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: next(clock))
    row = interleave("case", lambda: calls.append("a"), lambda: calls.append("b"), pairs=3)
    assert "".join(calls) == "abababab"
    assert (row["ratio"], row["ours"], row["reference"], row["ratio_range"]) == (3, 1, 3, [2, 6])


def test_json_is_one_object_of_the_promised_form(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(startup, "CASES", {"help": (["--version"], ["nothing"])})
    monkeypatch.setattr(startup, "call", lambda arguments: sys.stderr.write("called\n"))
    threads = torch.get_num_threads()
    assert command.main(["startup", "--quick", "--json"]) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"rows", "environment"}
    assert found["rows"][0]["case"] == "startup/help"
    assert all(isinstance(row[key], float) and row[key] > 0 for row in found["rows"] for key in ("ratio", "ours", "reference"))
    assert {"hardware", "versions", "threads", "load_before", "quick"} <= found["environment"].keys()
    assert json.loads((tmp_path / "results" / "startup.json").read_text()) == found


def test_cases_name_method_student_and_teacher(tmp_path):
    names = [step.Pair(name, step.Size(), tmp_path).case for name in ("dgad", "pgd-at")]
    assert names == ["dgad/resnet18-w0.125/resnet18-w0.25", "pgd-at/resnet18-w0.125"]


def test_the_timed_commands_work():
    startup.call([startup.EMPTY, "nothing"])
    startup.call(["-m", "robustkd", "--version"])
