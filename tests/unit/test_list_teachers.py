"""`robustkd list teachers` and `robustkd show teacher ID`: what is known, and where the weights are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from robustkd.training.teachers import cards, read_card
from tests.conftest import ROOT, Outcome

Command = Callable[..., Outcome]
SHIPPED = "fashion-mnist-resnet18"
ABSENT = "trades-wrn34-10-cifar10"


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ROBUSTKD_TEACHERS", raising=False)
    monkeypatch.setenv("ROBUSTKD_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def line(command: Command, name: str) -> str:
    done = command("list", "teachers")
    assert done.code == 0
    [found] = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
    return found


def test_every_card_is_a_line_with_its_figures(command: Command) -> None:
    rows = json.loads(command("list", "teachers", "--json").stdout)["teachers"]
    assert [row["name"] for row in rows] == [*cards()]
    found = {row["name"]: row for row in rows}
    assert (found[ABSENT]["clean"], found[ABSENT]["autoattack"], found[ABSENT]["weights"]) == (0.8492, 0.5308, None)
    assert (found[SHIPPED]["clean"], found[SHIPPED]["pgd10"]) == (0.893, 0.852)
    assert Path(found[SHIPPED]["weights"]).is_file()
    assert "84.9% clean  53.1% AA   not here" in line(command, ABSENT)
    assert "89.3% clean  85.2% PGD  here" in line(command, SHIPPED)


def test_weights_that_were_put_there_are_seen(command: Command, data: Path) -> None:
    file = data / "teachers" / read_card(ABSENT).file
    assert f"looked for {read_card(ABSENT).file} in {data / 'teachers'}" in command("show", "teacher", ABSENT).stdout
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert f"\n# weights: {file}\n" in command("show", "teacher", ABSENT).stdout
    assert " here  " in line(command, ABSENT) and "not here" not in line(command, ABSENT)


def test_a_card_is_shown_as_it_is(command: Command) -> None:
    done = command("show", "teacher", SHIPPED)
    assert done.code == 0 and yaml.safe_load(done.stdout) == yaml.safe_load(cards()[SHIPPED].read_text())


def test_an_unknown_teacher_is_3_with_the_nearest(command: Command) -> None:
    done = command("show", "teacher", "fashion-mnist-resnet19")
    assert done.code == 3 and f"did you mean {SHIPPED}?" in done.stderr


def test_the_list_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from robustkd.cli.app import run; sys.exit(run(['list', 'teachers']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and SHIPPED in done.stdout, done.stderr
