"""The scripts of bench/gpu, each in its smallest size on the CPU: they run, resume, and say what they did."""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bench.gpu import common, data, export_loss, rtx, smoke, students, teacher
from robustkd.training.teachers import Card


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are told to stop by SIGTERM; the test's own process is not."""
    for module in (teacher, students, export_loss, rtx, smoke):
        monkeypatch.setattr(module, "graceful", lambda: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run of the teacher leaves."""
    output = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "graceful", lambda: None)
        assert teacher.main(["--dry", "--output", str(output), "--set", "train.epochs=2"]) == 0
    return output


def test_a_teacher_is_a_file_in_half_precision_with_a_card(trained: Path) -> None:
    from safetensors.torch import load_file

    (card,), (weights,) = (list((trained / "zoo").glob(f"*.{suffix}")) for suffix in ("yaml", "safetensors"))
    told = Card.model_validate(yaml.safe_load(card.read_text()))
    assert told.file == weights.name and told.threat is not None
    assert {value.dtype.itemsize for value in load_file(weights).values() if value.is_floating_point()} == {2}
    test = told.measured["test"]
    assert 0 <= test["pgd20"] <= test["clean"] <= 1 and test["autoattack_n"] == 8
    assert str(trained) not in card.read_text()
    found = json.loads((trained / "teacher.json").read_text())
    assert found["status"] == "done" and found["figures"]["sha256"] == found["sha256"]
    assert {"gpu", "driver", "versions", "hardware", "date"} <= found["environment"].keys()


def test_export_loss_holds_a_file_against_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    words = ["--dry", "--data", str(trained / "data"), "--checkpoint", str(trained / "run"), "--precisions", "fp32"]
    assert export_loss.main([*words, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "export_loss.json").read_text())
    row = found["rows"]["fp32"]
    assert found["unfinished"] == [] and row["n"] == 24
    assert row["difference"]["robust"]["low"] <= 0 <= row["difference"]["robust"]["high"]
    assert "| fp32 |" in (tmp_path / "export_loss.md").read_text()


def test_a_table_of_students_leaves_out_what_it_has_no_teacher_for(trained: Path, tmp_path: Path) -> None:
    words = ["--data", str(trained / "data"), "--output", str(tmp_path), "--students", "rn18", "--methods", "b-mtard,dgad"]
    assert students.main(words) == 0
    rows = json.loads((tmp_path / "students.json").read_text())["rows"]
    assert [row["status"] for row in rows.values()] == ["left out", "left out"]
    assert "clean teacher" in rows["b-mtard-rn18"]["why"]


def test_a_student_is_trained_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--dry", "--output", str(tmp_path), "--students", "rn18", "--methods", "rslad"]
    assert students.main(words) == 0
    first = (tmp_path / "students.md").read_text()
    assert "rslad-rn18" in first
    monkeypatch.setattr(common.Clock, "python", lambda *args, **more: pytest.fail("there is nothing left to run"))
    assert students.main(words) == 0
    assert (tmp_path / "students.md").read_text() == first


@pytest.mark.parametrize("method", students.METHODS)
@pytest.mark.parametrize("student", students.STUDENTS)
def test_every_row_of_the_table_is_a_recipe(method: str, student: str, tmp_path: Path) -> None:
    from robustkd.api import load_recipe
    from robustkd.catalog import Shelf

    asked = students.options().parse_args(["--output", str(tmp_path), "--teacher", "t", "--clean-teacher", "c"])
    roles = {str(role) for role in Shelf("methods").get(method).roles}
    images = {"name": "npz", "train": ["train.npz"], "test": ["test.npz"]}
    words = [str(word) for word in students.recipe(method, student, roles, asked, images)]
    settings = [word for before, word in itertools.pairwise(words) if before == "--set"]
    made = load_recipe(words[1], settings)
    assert made.method.name == method and made.train.epochs == 30 and made.dataset.name == "npz"
    assert {teacher.role for teacher in made.teachers} == roles


@pytest.mark.parametrize("file", sorted(common.HERE.glob("teacher-*.yaml")), ids=lambda file: file.stem)
def test_the_teachers_recipes_are_recipes(file: Path) -> None:
    from robustkd.api import load_recipe

    assert load_recipe(str(file)).train.schedule.name == "onecycle"


def test_tensorrt_rtx_without_a_gpu_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "ENGINES", {"default": ()})
    assert rtx.main(["--dry", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "rtx.json").read_text())
    if found["environment"]["driver_cuda"] is None:
        assert found["outcome"] == "not tried"
        assert "driver" in found["engines"]["default"]["load"]["error"]


@pytest.mark.parametrize(
    ("load", "outcome"),
    [
        ({"gpu": {}, "deserialised": True, "runs": True}, "runs"),
        ({"gpu": {}, "deserialised": False, "log": "ERROR: unsupported capability"}, "refused"),
        ({"gpu": {}, "code": -11}, "refused"),
        ({"error": "there is no NVIDIA driver"}, "not tried"),
    ],
)
def test_the_outcome_of_the_probe(load: dict, outcome: str) -> None:
    assert rtx.outcome({"default": {"load": load}, "sm80": {"load": {}}}) == outcome


def test_smoke_counts_the_tests_it_ran(tmp_path: Path) -> None:
    found = smoke.tests(tmp_path, common.Clock(5), dry=True, only="test_a_step_in_bf16 and kd and not akd")
    assert found["passed"] == 2 and not found["failures"]


# --- the clock -------------------------------------------------------------------------------------------------------

SAVES = (
    "import signal, sys, time, pathlib\n"
    "def stop(*_):\n    pathlib.Path(sys.argv[1]).write_text('saved')\n    sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[2]).touch()\ntime.sleep(60)\n"
)


def test_what_takes_too_long_is_told_to_save_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "GRACE", 5.0)
    clock = common.Clock(0.15)
    with pytest.raises(common.TimeUp):
        clock.python("-c", SAVES, tmp_path / "state", tmp_path / "begun")
    assert not (tmp_path / "begun").exists() or (tmp_path / "state").read_text() == "saved"


def test_a_failure_is_no_lack_of_time() -> None:
    with pytest.raises(common.Failed, match="ended with 3"):
        common.Clock(5).python("-c", "raise SystemExit(3)")
    assert common.Clock(5).python("-c", "print(1)", ok=(0,)) == "1\n"


def test_nothing_is_begun_when_the_time_is_up() -> None:
    with pytest.raises(common.TimeUp):
        common.Clock(0).python("-c", f"open({str(sys.executable)!r})")


def test_folders_are_recorded_by_their_names() -> None:
    told = common.told("teacher", ["--data", "/somewhere/x", "--minutes", "8", "--output", "there"])
    assert told == ["python -m bench.gpu.teacher", "--data", "DATA", "--minutes", "8", "--output", "OUTPUT"]


# --- images ----------------------------------------------------------------------------------------------------------


def grid(file: Path, n: int, seed: int) -> np.ndarray:
    """A part of CIFAR-10 as the folder of real images holds it: one lossless picture of n tiles in a row."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(tiles.transpose(1, 0, 2, 3).reshape(32, n * 32, 3))).save(
        packed, "WEBP", lossless=True, exact=True
    )
    webp = np.frombuffer(packed.getvalue(), np.uint8)
    held = {"tile": 32, "cols": n, "per_stream": n, "offsets": [0, len(webp)], "labels": np.arange(n) % 10}
    np.savez(file, webp=webp, **held)
    return tiles.transpose(0, 3, 1, 2)


def test_images_that_come_in_several_loads_are_added_once(tmp_path: Path) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for folder in (first, second):
        folder.mkdir()
    one = grid(first / "cifar10_train_1.npz", 6, seed=1)
    two = grid(second / "cifar10_train_2.npz", 4, seed=2)
    grid(second / "cifar10_test_0000_4999.npz", 3, seed=3)
    for source in (first, second, first):
        assert data.main([str(source), "--output", str(out)]) == 0
    with np.load(out / "train.npz") as held:
        np.testing.assert_array_equal(held["x"], np.concatenate([one, two]))
        assert held["y"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert common.data_set(students.options().parse_args(["--output", "o", "--data", str(out)]))["name"] == "npz"


def test_images_that_others_made_are_left_alone(tmp_path: Path) -> None:
    grid(tmp_path / "cifar10_train_1.npz", 3, seed=1)
    np.savez(tmp_path / "train.npz", x=np.zeros((1, 3, 32, 32), np.uint8), y=np.zeros(1, np.int64))
    before = (tmp_path / "train.npz").read_bytes()
    with pytest.raises(SystemExit, match="another --output"):
        data.main([str(tmp_path), "--output", str(tmp_path)])
    assert (tmp_path / "train.npz").read_bytes() == before


def test_missing_images_are_told_with_the_command_that_makes_them(tmp_path: Path) -> None:
    asked = students.options().parse_args(["--output", "o", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"bench\.gpu\.data"):
        common.data_set(asked)
