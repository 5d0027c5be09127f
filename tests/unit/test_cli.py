"""The command line's own duties: quick help, no heavy imports, errors as three lines and an exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import pytest
import typer

from robustkd import __version__, errors
from robustkd.cli import _errors, _lazy
from robustkd.cli.app import run
from tests.conftest import ROOT, Outcome, environment

Cli = Callable[..., Outcome]
HEAVY = ("torch", "onnx", "onnxruntime", "torchvision", "accelerate", "numpy", "pydantic", "pyarrow", "scipy", "matplotlib")


def _in_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_help_is_quick(cli: Cli) -> None:
    # 0.6 s is the promise on an idle machine; the best of five discounts what else runs, and shared CI gets twice the time
    margin = 2.0
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert cli("--help").code == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.6 * margin, f"robustkd --help took {min(seconds):.2f} s at best"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom robustkd.cli.app import run\nrun(['--help'])\nprint('LOADED', *sorted(sys.modules))"
    loaded = set(_in_python(code).rpartition("LOADED")[2].split())
    assert "robustkd.cli.app" in loaded
    assert loaded.isdisjoint(HEAVY)
    assert not {f"robustkd.cli.{name}" for name in _lazy.COMMANDS} & loaded


@pytest.mark.parametrize("name", _lazy.COMMANDS)
def test_help_of_each_command_imports_no_torch(name: str) -> None:
    code = (
        f"import sys\nfrom robustkd.cli.app import run\nprint('CODE', run([{name!r}, '--help']))\nprint('LOADED', *sys.modules)"
    )
    out = _in_python(code)
    assert "CODE 0" in out
    loaded = set(out.rpartition("LOADED")[2].split())
    assert loaded.isdisjoint({"torch", "onnx", "onnxruntime", "torchvision", "accelerate"})


def test_help_lists_every_command_of_the_contract(cli: Cli) -> None:
    out = cli("--help").stdout
    for name in _lazy.COMMANDS:
        assert f" {name} " in out
    for option in ("--version", "--debug", "--install-completion", "--help"):
        assert option in out


def test_every_command_file_is_registered_and_has_help_of_its_own() -> None:
    files = {file.stem for file in (ROOT / "robustkd" / "cli").glob("[a-z]*.py")} - {"app"}
    assert files == set(_lazy.COMMANDS)
    for name in files:
        assert _lazy.load(name).help.strip(), name


def test_version_and_bare_command(cli: Cli) -> None:
    assert cli("--version") == Outcome(0, f"robustkd {__version__}\n", "")
    bare = cli()
    assert bare.code == 0 and "Usage: robustkd" in bare.stdout


@pytest.mark.parametrize(
    ("args", "where", "word"),
    [
        (("--nonsense",), "robustkd", "--nonsense"),
        (("lits", "methods"), "robustkd", "list"),
        (("list",), "robustkd list", "KIND"),
        (("list", "methods", "--jsno"), "robustkd list", "--json"),
    ],
)
def test_wrong_command_line_is_2(command: Cli, args: tuple[str, ...], where: str, word: str) -> None:
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    what, at, fix = err.splitlines()
    assert word in what
    assert at == f"  at: {where}"
    assert fix == f"  fix: {where} --help"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[str]]:
    """Make `robustkd doctor` raise something; the arguments that run it."""

    def arm(error: BaseException) -> list[str]:
        def doctor() -> None:
            raise error

        module = ModuleType("robustkd.cli.doctor")
        module.doctor = doctor  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "robustkd.cli.doctor", module)
        return ["doctor"]

    return arm


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 3),
        (errors.RequirementError, 4),
        (errors.ArtifactError, 5),
        (errors.NumericsError, 6),
        (errors.RobustKDError, 1),
    ],
)
def test_each_error_class_prints_three_lines_and_its_code(
    kind: type[errors.RobustKDError], code: int, failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(kind("train.epohcs is no field", where="a.yaml, line 14", fix="did you mean train.epochs?"))) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "train.epohcs is no field\n  at: a.yaml, line 14\n  fix: did you mean train.epochs?\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_128_plus_its_number_and_keeps_the_resume_line(
    number: signal.Signals, code: int, failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(errors.Interrupted(number, resume="robustkd distill --resume"))) == code
    assert capsys.readouterr().err == "interrupted\n  fix: resume with: robustkd distill --resume\n"


def test_an_interrupted_command_that_can_resume_says_how() -> None:
    assert _errors.resume_command(["distill", "--recipe", "my recipe"]) == "robustkd distill --recipe 'my recipe' --resume"
    assert _errors.resume_command(["audit", "m.onnx", "--resume"]) == "robustkd audit m.onnx --resume"
    assert _errors.resume_command(["list", "methods"]) == ""


def test_ctrl_c_outside_a_loop_is_130(failing: Callable[..., list[str]]) -> None:
    assert run(failing(KeyboardInterrupt())) == 130


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EIO])
def test_the_operating_systems_refusals_are_5(
    number: int, failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(OSError(number, os.strerror(number), "some/file"))) == 5
    what, at, fix = capsys.readouterr().err.splitlines()
    assert (what, at) == (os.strerror(number), "  at: some/file")
    assert fix.startswith("  fix: ")


def test_a_missing_package_names_its_extra(failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(ModuleNotFoundError("No module named 'torch'", name="torch.nn"))) == 4
    assert capsys.readouterr().err.splitlines() == [
        "this needs the package torch, which is not installed",
        "  fix: pip install 'robustkd[train]'",
    ]


def test_a_missing_module_of_ours_is_a_bug(failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(ModuleNotFoundError("No module named 'robustkd.gone'", name="robustkd.gone"))) == 1
    assert "this is a bug in robustkd" in capsys.readouterr().err


def test_any_other_exception_is_a_bug_in_one_line(
    failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(ZeroDivisionError("two\nlines"))) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "this is a bug in robustkd: ZeroDivisionError: two lines"
    assert "robustkd --debug" in second


@pytest.mark.parametrize(("error", "code"), [(ZeroDivisionError("x"), 1), (errors.ArtifactError("damaged"), 5)])
def test_debug_shows_the_traceback_and_keeps_the_code(
    error: Exception, code: int, failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--debug", *failing(error)]) == code
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert type(error).__name__ in err


def test_an_exit_code_of_a_command_passes(failing: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(typer.Exit(11))) == 11
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "robustkd", "list", "recipes"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == b""


def test_output_is_plain_when_piped(cli: Cli) -> None:
    for args in (("--help",), ("list", "recipes"), ("lits",)):
        outcome = cli(*args)
        assert "\x1b" not in outcome.stdout + outcome.stderr


def test_json_is_alone_on_stdout(cli: Cli) -> None:
    code, out, err = cli("list", "recipes", "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == ["recipes"]
