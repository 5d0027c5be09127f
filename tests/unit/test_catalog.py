"""Shelves find entries by file name; errors carry the nearest valid name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from robustkd import errors
from robustkd.catalog import Shelf
from robustkd.errors import ConfigError, RobustKDError, nearest

SHELVES = ["methods", "models", "datasets"]


@pytest.mark.parametrize("shelf", SHELVES)
def test_every_entry_is_found_and_keeps_its_name(shelf: str) -> None:
    names = Shelf(shelf).names()
    assert names and names == sorted(set(names))
    for name in names:
        entry = Shelf(shelf).get(name)
        config = entry.Config if shelf == "methods" else entry
        assert config.model_fields["name"].default == name
        assert entry.summary


@pytest.mark.parametrize(
    ("shelf", "name", "fix"),
    [
        ("methods", "pgd_at", "did you mean pgd-at?"),
        ("methods", "trade", "did you mean trades?"),
        ("methods", "_base", "valid: "),
        ("methods", "", "valid: "),
        ("methods", "../catalog", "valid: "),
        ("models", "resnet-18", "did you mean resnet18?"),
        ("datasets", "__init__", "valid: "),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_all(shelf: str, name: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"is not on the shelf of {shelf}") as caught:
        Shelf(shelf).get(name)
    assert caught.value.fix.startswith(fix) and caught.value.exit_code == 3


def test_names_are_listed_without_importing_an_entry() -> None:
    code = "import sys; from robustkd.catalog import Shelf; Shelf('methods').names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Foreign:
    name = "foreign"

    def load(self) -> str:
        return "an entry of another package"


def test_entries_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkd.catalog.metadata.entry_points", lambda group: [Foreign()] * (group == "robustkd.methods"))
    assert "foreign" in Shelf("methods").names() and "foreign" not in Shelf("models").names()
    assert Shelf("methods").get("foreign") == "an entry of another package"


@pytest.mark.parametrize(
    ("name", "valid", "sentence"),
    [
        ("epohcs", ["epochs", "lr"], "did you mean epochs?"),
        ("zzz", ["b", "a"], "valid: a, b"),
        ("epochs", ["epochs"], "did you mean epochs?"),
    ],
)
def test_nearest(name: str, valid: list[str], sentence: str) -> None:
    assert nearest(name, valid) == sentence


def test_errors_print_what_where_and_fix() -> None:
    assert (
        str(RobustKDError("a is wrong", where="file, line 3", fix="write b"))
        == "a is wrong\n  at: file, line 3\n  fix: write b"
    )
    assert str(RobustKDError("a is wrong")) == "a is wrong"


def test_exit_codes_are_those_of_the_contract() -> None:
    codes = {
        name: getattr(errors, name).exit_code for name in ("ConfigError", "RequirementError", "ArtifactError", "NumericsError")
    }
    assert codes == {"ConfigError": 3, "RequirementError": 4, "ArtifactError": 5, "NumericsError": 6}
    assert str(errors.Interrupted(2, resume="robustkd distill --resume")).endswith("resume with: robustkd distill --resume")
