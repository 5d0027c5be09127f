"""Settings of every test: one CPU thread, repeatable hypothesis, no settings of the tester; and the CLI as a fixture."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent

# before torch or a BLAS is imported: sums come out the same on every machine, and busy machines do not stall
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

settings.register_profile(
    "robustkd", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("robustkd")


class Outcome(NamedTuple):
    """What a command line left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tester's own data and runs folders must not leak into a test."""
    for name in ("ROBUSTKD_DATA", "ROBUSTKD_RUNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROBUSTKD_RTX_CACHE", "")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """As OMP_NUM_THREADS above, for a torch that something imported earlier."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Outcome]:
    """The real CLI in a process of its own, in an empty folder: `cli("list", "methods")` -> (code, stdout, stderr)."""

    def call(*args: object, cwd: Path = tmp_path, env: Mapping[str, str] | None = None, timeout: float = 300) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "robustkd", *map(str, args)],
            cwd=cwd,
            env=environment() | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The same in this process, which saves the seconds of importing torch; what `main` does, short of leaving."""
    from robustkd.cli.app import run

    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Outcome:
        capsys.readouterr()
        code = run([*map(str, args)])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


def environment() -> dict[str, str]:
    """The environment of a process that must find this checkout and nothing of the tester's."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "TERM": "dumb"}
