"""A recipe that asks a method for what it cannot do: exit 3 with the field, the file and line, and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from robustkd.catalog import Shelf
from tests.conftest import Outcome

Command = Callable[..., Outcome]
METHODS = Shelf("methods").names()
SHIPPED = "fashion-mnist-resnet18"
WITH_TAU = [name for name in METHODS if "tau" in Shelf("methods").get(name).Config.model_fields]


def teachers(roles: list[str]) -> str:
    """The section as YAML on lines of its own, the word `teachers` on the first."""
    return "\n".join(["teachers:", *(f"  - {{role: {role}, id: {SHIPPED}}}" for role in roles)] if roles else ["teachers: []"])


def roles_of(method: str) -> list[str]:
    return sorted(Shelf("methods").get(method).roles)


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Callable[..., str]:
    """What a recipe is refused with, which must be the whole of the answer: nothing is trained, nothing written."""

    def call(method: str, *, roles: list[str] | None = None, student: str = "{name: resnet18, width: 0.0625}") -> str:
        name = method.partition(",")[0]
        (tmp_path / "mine.yaml").write_text(
            f"dataset: fashion-mnist-10k\nstudent: {student}\nmethod: {{name: {method}}}\n"
            f"{teachers(roles_of(name) if roles is None else roles)}\n"
            "train: {epochs: 1, tensorboard: false, device: cpu}\n"
        )
        code, out, err = command("distill", "--recipe", "mine.yaml", "--output", "out")
        assert (code, out) == (3, ""), err
        assert not (tmp_path / "out").exists() and "Traceback" not in err
        return err

    return call


def said(what: str, where: str, fix: str) -> str:
    return f"{what}\n  at: {where}\n  fix: {fix}\n"


@pytest.mark.parametrize("method", [name for name in METHODS if roles_of(name)])
def test_a_method_without_its_teachers(method: str, refused: Callable[..., str]) -> None:
    err = refused(method, roles=[])
    wanted = " and ".join(roles_of(method))
    assert err.startswith(f"teachers: {method} wants {wanted} teacher(s), the recipe gives none\n  at: mine.yaml, line 4\n")
    assert all(f"{{role: {role}, id: NAME}}" in err for role in roles_of(method))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_a_teacher_too_many(method: str, refused: Callable[..., str]) -> None:
    given = [*roles_of(method), "robust"]
    err = refused(method, roles=given)
    assert err.startswith(f"teachers: {method} wants ") and f"the recipe gives {', '.join(sorted(given))}\n" in err
    assert "  at: mine.yaml, line 4\n" in err


@pytest.mark.parametrize("method", [name for name in METHODS if len(roles_of(name)) == 1])
def test_a_method_with_a_teacher_of_the_wrong_role(method: str, refused: Callable[..., str]) -> None:
    (wanted,) = roles_of(method)
    other = "clean" if wanted == "robust" else "robust"
    what = f"teachers: {method} wants {wanted} teacher(s), the recipe gives {other}"
    assert refused(method, roles=[other]) == said(what, "mine.yaml, line 4", f"teachers: [{{role: {wanted}, id: NAME}}]")


def test_teachers_left_out_are_missed_where_the_method_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("dataset: fashion-mnist-10k\nstudent: resnet18\nmethod: dgad\n")
    code, _, err = command("distill", "--recipe", "mine.yaml", "--output", "out")
    assert code == 3 and "wants robust teacher(s), the recipe gives none\n  at: mine.yaml, line 3\n" in err


def test_a_role_that_does_not_exist(refused: Callable[..., str]) -> None:
    err = refused("dgad", roles=["robst"])
    assert err == said("teachers.0.role: input should be 'robust' or 'clean'", "mine.yaml, line 5", "did you mean robust?")


def test_a_student_that_does_not_exist(refused: Callable[..., str]) -> None:
    err = refused("dgad", student="{name: resnet81}")
    assert err == said("student: resnet81 is not on the shelf of models", "mine.yaml, line 2", "did you mean resnet18?")


def test_an_option_the_student_does_not_have(refused: Callable[..., str]) -> None:
    err = refused("dgad", student="{name: resnet18, widht: 1}")
    assert err == said("student.widht is not a field", "mine.yaml, line 2", "did you mean width?")


def test_a_method_that_does_not_exist(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("dataset: fashion-mnist-10k\nstudent: resnet18\nmethod: dgda\n")
    code, _, err = command("distill", "--recipe", "mine.yaml", "--output", "out")
    assert code == 3
    assert err == said("method: dgda is not on the shelf of methods", "mine.yaml, line 3", "did you mean dgad?")


@pytest.mark.parametrize("method", WITH_TAU)
@pytest.mark.parametrize("tau", ["0", "-1", ".inf", ".nan", "warm"])
def test_a_temperature_must_be_positive_and_finite(method: str, tau: str, refused: Callable[..., str]) -> None:
    err = refused(f"{method}, tau: {tau}")
    assert err.startswith("method.tau: input should be ") and "  at: mine.yaml, line 3\n  fix: it is " in err


def test_some_methods_have_a_temperature() -> None:
    assert {"ard", "iad", "kd"} <= set(WITH_TAU)


@pytest.mark.parametrize("method", METHODS)
def test_an_option_the_method_does_not_have(method: str, refused: Callable[..., str]) -> None:
    err = refused(f"{method}, no_such_knob: 1")
    known = sorted(Shelf("methods").get(method).Config.model_fields)
    assert err == said("method.no_such_knob is not a field", "mine.yaml, line 3", f"valid: {', '.join(known)}")


def test_a_misspelt_option_gets_the_nearest(refused: Callable[..., str]) -> None:
    assert refused("dgad, bta: 1") == said("method.bta is not a field", "mine.yaml, line 3", "did you mean beta?")


def test_a_setting_on_the_command_line_is_named_as_such(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"dataset: fashion-mnist-10k\nstudent: resnet18\nmethod: ard\n{teachers(['robust'])}\n")
    code, out, err = cli("distill", "--recipe", "mine.yaml", "--set", "method.tau=0", "--output", "out")
    assert (code, out) == (3, "")
    assert err == said("method.tau: input should be greater than 0", "--set method.tau=0", "it is 0")
