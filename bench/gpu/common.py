"""What the scripts share: their options, a clock, the product's command under a time limit, the record of the machine."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from robustkd.bundle import hardware, versions, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
AGAIN = 75
"""Exit code of a step whose time was up before it was done: the same command goes on (EX_TEMPFAIL)."""
STOPPED = (130, 143)
GRACE = 45.0
"""Seconds kept back for a state to be saved after SIGTERM."""
LIMIT_MB = 25
"""Of a file of weights that goes into the repository."""


def parser(text: str | None, *, data: bool = True) -> argparse.ArgumentParser:
    """The options that all steps have."""
    told = argparse.ArgumentParser(description=str(text).partition("\n")[0])
    told.add_argument("--output", type=Path, required=True, help="results go here; the same folder resumes")
    told.add_argument("--minutes", type=float, default=9.0, help="of all this command does; what is left is done next time")
    told.add_argument("--dry", action="store_true", help="the smallest sizes, on a CPU, to see that it runs")
    if data:
        told.add_argument("--data", type=Path, help="the folder with train.npz and test.npz; --dry makes its own")
    return told


class TimeUp(Exception):
    """The minutes are over; what is done is kept."""


class Failed(Exception):
    """A command of the product failed."""


@dataclass
class Clock:
    """The minutes of one call.

    Attributes:
        minutes: allowed.
        began: on the monotonic clock.
    """

    minutes: float
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.began)

    def robustkd(self, *words: object, env: Mapping[str, str] | None = None, ok: Sequence[int] = (0,)) -> str:
        """Run `robustkd WORDS`, with SIGTERM early enough to save its state; what it printed on stdout.

        Args:
            words: of the command line.
            env: variables beside those of this process.
            ok: exit codes that are no failure.

        Raises:
            TimeUp: it was stopped, and resumes with the same command.
            Failed: it ended with another code.
        """
        return self.python("-m", "robustkd", *words, env=env, ok=ok)

    def python(self, *words: object, env: Mapping[str, str] | None = None, ok: Sequence[int] = (0,)) -> str:
        """As `robustkd`, for any arguments of the interpreter."""
        if self.left() <= GRACE / 3:
            raise TimeUp
        line = [sys.executable, *map(str, words)]
        say(f"$ {' '.join(line[1:])}")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        whole = {**os.environ, "PYTHONPATH": path, **(env or {})}
        child = subprocess.Popen(line, cwd=Path.cwd(), env=whole, stdout=subprocess.PIPE, text=True)
        try:
            out, stopped = self._wait(child)
        except BaseException:
            child.send_signal(signal.SIGTERM)  # this process is being stopped: the child saves its state too
            child.communicate(timeout=GRACE)
            raise
        if stopped or child.returncode in STOPPED:
            raise TimeUp
        if child.returncode not in ok:
            raise Failed(f"{' '.join(line[1:])} ended with {child.returncode}")
        return out

    def _wait(self, child: subprocess.Popen[str]) -> tuple[str, bool]:
        try:
            return child.communicate(timeout=max(1.0, self.left() - min(GRACE, 20 * self.minutes)))[0], False
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
        try:
            out = child.communicate(timeout=GRACE)[0]
        except subprocess.TimeoutExpired:
            child.kill()
            out = child.communicate()[0]
        return out, child.returncode != 0

    def distill(self, folder: Path, *words: object) -> Path:
        """`robustkd distill` into a folder, begun or resumed; the checkpoint.

        Raises:
            TimeUp: it was stopped, and resumes with the same command.
            Failed: it ended with an error.
        """
        done = folder / "checkpoint"
        if not (done / "manifest.json").is_file():
            again = ["--resume"] if (folder / ".training" / "recipe.json").is_file() else []
            self.robustkd("distill", *words, "--output", folder, *again)
        return done


def graceful() -> None:
    """SIGTERM ends this process as Ctrl-C does, so that a child is told to save its state."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def told(module: str, argv: Sequence[str]) -> list[str]:
    """The command as it is recorded: folders by the names of their options, for a reader has others."""
    words = [f"python -m bench.gpu.{module}"]
    for before, word in zip(["", *argv], argv, strict=False):
        words.append(before.removeprefix("--").upper() if before in FOLDERS else word)
    return words


FOLDERS = ("--data", "--output", "--zoo", "--wheels", "--teacher", "--clean-teacher", "--checkpoint")


def say(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """Where figures arose: machine, GPU, driver, versions, date, and the command."""
    import torch

    from robustkd.engines._driver import probe

    driver, there = probe(), torch.cuda.is_available()
    return {
        "hardware": hardware(),
        "gpu": torch.cuda.get_device_name() if there else None,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if there else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if there else None,
        "driver": _driver_version() or driver.reason,
        "driver_cuda": driver.cuda,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if there else None,
        "versions": versions(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
    }


def _driver_version() -> str:
    try:
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(line, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def save(folder: Path, name: str, found: dict[str, Any], command: Sequence[str]) -> None:
    """Write a result with the record of the machine beside it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {**found, "environment": environment(command)})


def write_text(file: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode())


def read(file: Path) -> dict[str, Any]:
    """A result written before, or nothing."""
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def data_set(asked: argparse.Namespace) -> dict[str, Any]:
    """The section `dataset` of a recipe for the folder of images; a dry run writes one.

    Raises:
        SystemExit: the files are not there.
    """
    folder: Path = asked.data or asked.output / "data"
    if asked.dry and asked.data is None and not (folder / "test.npz").is_file():
        from bench.gpu.data import write_small

        write_small(folder)
    for name in ("train.npz", "test.npz"):
        if not (folder / name).is_file():
            raise SystemExit(f"there is no {name} in {folder}: python -m bench.gpu.data SOURCE --output {folder}")
    return {"name": "npz", "train": [str((folder / "train.npz").resolve())], "test": [str((folder / "test.npz").resolve())]}


def setting(key: str, value: Any) -> list[str]:
    """`--set KEY=VALUE`, the value as JSON, which is YAML."""
    return ["--set", f"{key}={json.dumps(value)}"]


def percent(figure: Mapping[str, float] | float | None) -> str:
    """`51.2 (49.0 to 53.4)` of an interval of fractions, or the figure alone."""
    if figure is None:
        return "-"
    if isinstance(figure, (int, float)):
        return f"{100 * figure:.1f}"
    return f"{100 * figure['estimate']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
