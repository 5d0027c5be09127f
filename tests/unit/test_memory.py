"""A folder of pictures is held once, or not at all where it is streamed: peak memory of real processes."""

import json
import sys

import pytest

from bench import memory

pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("torchvision", reason="needs torchvision")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process begins anew only on Linux")
def test_no_picture_is_held_twice(tmp_path, monkeypatch, capsys):
    """The few dozen MiB of a batch come on top; the control, which does hold a second copy, is seen to."""
    monkeypatch.setattr(memory, "RESULTS", tmp_path)
    assert memory.main(["--images", "3500", "--size", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "memory-folder.json").read_text()) == found
    ratios = {row["case"]: row["ratio"] for row in found["rows"]}
    assert all(row["pixels_mib"] == pytest.approx(3500 * 3 * 64 * 64 / 2**20) for row in found["rows"])
    assert 0.9 < ratios["held"] < 1.75, ratios
    assert ratios["streamed"] < 0.75, ratios
    assert ratios["twice"] > 1.9, ratios


def test_every_case_reads_the_pictures_it_was_given(tmp_path):
    memory.make(tmp_path, 6, 16)
    assert sorted(file.parent.name for file in tmp_path.glob("train/*/*.jpg")) == ["a"] * 3 + ["b"] * 3
    for case in memory.CASES:
        row = memory.peak(case, tmp_path)
        assert row["case"] == case and row["pixels_mib"] == 6 * 3 * 16 * 16 / 2**20 and row["added_mib"] >= 0


def test_the_table_names_every_case():
    rows = [{"case": case, "pixels_mib": 100.0, "added_mib": 110.0, "ratio": 1.1} for case in memory.CASES]
    told = memory.table({"rows": rows, "environment": {"hardware": {"cpu": "one"}, "versions": {"torch": "2"}}})
    assert told.splitlines()[1] == "held        1.10       110 MiB above the start, pixels     100 MiB"
    assert [line.split()[0] for line in told.splitlines()[1:]] == list(memory.CASES)
