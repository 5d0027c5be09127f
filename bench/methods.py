"""methods: every method with the same student, teachers, images and budget, over seeds, held against PGD-AT.

    python -m bench.methods --output runs/bench-methods [--methods a,b] [--seeds 0,1,2]

Each run is a process of its own and leaves OUTPUT/LABEL-sSEED/measured.json; what is measured is not run again, what was
interrupted resumes. The page goes to docs/results/methods.md once all of it is measured, and to OUTPUT/methods.md always.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from bench._methods_page import page
from bench._methods_plan import AUTOATTACK, CLEAN_TEACHER, ROBUST_TEACHER, Setting, choose, rows
from bench._methods_run import FAILED, INTERRUPTED, MEASURED
from robustkd.bundle import write_atomic, write_json
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError, ConfigError, RobustKDError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "methods.md"
DEFAULT = Setting()


def main(argv: list[str]) -> int:
    asked = parser().parse_args(argv)
    try:
        return compare(asked)
    except RobustKDError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    told = argparse.ArgumentParser(prog="python -m bench.methods", description=str(__doc__).split("\n", 1)[0])
    told.add_argument("--output", type=Path, default=Path("runs/bench-methods"), help="the same folder resumes")
    told.add_argument("--methods", type=_names, help="rows, comma-separated; left out: all (--list names them)")
    told.add_argument("--seeds", type=_seeds, default=(0, 1, 2))
    told.add_argument("--epochs", type=int, default=DEFAULT.epochs)
    told.add_argument("--n", type=int, default=DEFAULT.n, help="test images for clean and PGD-20 accuracy")
    told.add_argument("--attack-n", type=int, default=DEFAULT.attack_n, help="test images for AutoAttack")
    told.add_argument("--attacks", type=_names, default=DEFAULT.attacks, help=f"of {', '.join(AUTOATTACK)}; these in turn")
    told.add_argument("--queries", type=int, default=DEFAULT.queries, help="of Square")
    told.add_argument("--train-n", type=int, default=DEFAULT.train_n, help="training images; left out: all")
    told.add_argument("--teacher-epochs", type=int, default=DEFAULT.teacher_epochs, help="of the clean teacher")
    told.add_argument("--threads", type=int, default=DEFAULT.threads, help="of each run")
    told.add_argument("--jobs", type=int, default=1, help="runs at a time")
    told.add_argument("--page", type=Path, help="where the page goes; left out: docs, and only with all methods")
    told.add_argument("--list", action="store_true", help="name the rows and stop")
    return told


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def compare(asked: argparse.Namespace) -> int:
    """Run what is missing, then write the page from what is measured."""
    if asked.list:
        print("\n".join(rows(asked.epochs)))
        return 0
    setting = setting_of(asked)
    labels = [row.label for row in choose(asked.methods or rows(asked.epochs), asked.epochs)]
    wants_clean = [row for row in choose(labels, asked.epochs) if "clean" in _roles(row.method, row.knobs)]
    wants_robust = [row for row in choose(labels, asked.epochs) if "robust" in _roles(row.method, row.knobs)]
    first = [CLEAN_TEACHER] if wants_clean else []
    then = [f"{label}-s{seed}" for seed in asked.seeds for label in labels] + ([ROBUST_TEACHER] if wants_robust else [])
    output: Path = asked.output
    agree(output, setting)
    stopped = Team(output, asked.jobs, setting.threads).run([first, then])
    status = summarise(output, asked, [*first, *then])
    return INTERRUPTED if stopped else status


def _roles(method: str, knobs: dict[str, Any]) -> tuple[str, ...]:
    entry = Shelf("methods").get(method)
    roles: tuple[str, ...] = entry.roles_for(entry.Config.model_validate({"name": method, **knobs}))
    return roles


def setting_of(asked: argparse.Namespace) -> Setting:
    """The setting of the command line.

    Raises:
        ConfigError: a number is below 1, or an attack is unknown.
    """
    for name in ("epochs", "n", "attack_n", "queries", "teacher_epochs", "threads", "jobs"):
        if getattr(asked, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is below 1", fix="give a number of at least 1")
    for attack in asked.attacks:
        if attack not in AUTOATTACK:
            raise ConfigError(f"{attack} is no part of AutoAttack", fix=f"choose from {', '.join(AUTOATTACK)}")
    fields = ("epochs", "n", "attack_n", "attacks", "queries", "threads", "train_n", "teacher_epochs")
    return Setting(**{name: getattr(asked, name) for name in fields})


def agree(output: Path, setting: Setting) -> None:
    """Note the setting in the folder, or compare it with the one noted there.

    Raises:
        ArtifactError: the folder holds runs of another setting.
    """
    file = output / "setting.json"
    output.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write_json(file, {"setting": setting.plain()})
    elif (before := json.loads(file.read_bytes())["setting"]) != setting.plain():
        changed = [key for key, value in setting.plain().items() if before.get(key) != value]
        raise ArtifactError(
            f"this folder holds runs of another setting ({', '.join(changed)})",
            where=str(file),
            fix="repeat its options, or choose another --output",
        )


class Team:
    """Runs, so many at a time, each in a process of its own: clean memory, its own threads."""

    def __init__(self, output: Path, jobs: int, threads: int) -> None:
        self.output, self.jobs, self.threads = output, jobs, threads
        self.stopped = threading.Event()
        self.children: set[subprocess.Popen[bytes]] = set()

    def run(self, stages: list[list[str]]) -> bool:
        """Run each stage's names; whether a signal stopped it."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(s, self._stop) for s in signals]
        try:
            for names in stages:
                with ThreadPoolExecutor(self.jobs) as pool:
                    list(pool.map(self._one, names))
        finally:
            for s, handler in zip(signals, before, strict=True):
                signal.signal(s, handler)
        return self.stopped.is_set()

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopped.set()
        for child in list(self.children):
            child.send_signal(signal.SIGTERM)  # they are in sessions of their own: Ctrl-C reaches them here only

    def _one(self, name: str) -> None:
        folder = self.output / name
        if self.stopped.is_set() or (folder / MEASURED).is_file():
            return
        folder.mkdir(exist_ok=True)
        threads = {f"{library}_NUM_THREADS": str(self.threads) for library in ("OMP", "MKL", "OPENBLAS")}
        command = [sys.executable, "-m", "bench._methods_run", str(self.output.resolve()), name]
        print(f"{name}: started", file=sys.stderr, flush=True)
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=log, start_new_session=True
            )
            self.children.add(child)
            if self.stopped.is_set():
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            self.children.discard(child)
        if code and self.stopped.is_set():
            code = INTERRUPTED  # whatever it was doing: a signal may arrive before it can answer one
        if code not in (0, INTERRUPTED) and not (folder / FAILED).is_file():
            write_json(folder / FAILED, {"name": name, "what": f"a bug: it left with code {code}; see its log.txt"})
        word = {0: "measured", INTERRUPTED: "interrupted"}.get(code, "failed")
        print(f"{name}: {word}", file=sys.stderr, flush=True)


def summarise(output: Path, asked: argparse.Namespace, names: list[str]) -> int:
    """Write the page from the measured.json files; 0 where all are there, 1 where one failed or is missing."""
    runs = [json.loads(file.read_bytes()) for name in names if (file := output / name / MEASURED).is_file()]
    missing = [name for name in names if not (output / name / MEASURED).is_file()]
    failed = {name: json.loads(file.read_bytes())["what"] for name in missing if (file := output / name / FAILED).is_file()}
    for name in missing:
        print(f"{name}: {failed.get(name, 'not run')}", file=sys.stderr)
    if not any("label" in run for run in runs):
        return 1
    text = page(runs, command_of(asked), missing=missing, failed=failed)
    write_atomic(output / "methods.md", text.encode())
    target = asked.page or (PAGE if asked.methods is None else None)
    if target is not None and set(missing) <= set(failed):
        write_atomic(target, text.encode())
    print(text[text.index("## Result") :].split("\n\n")[1])
    return 1 if missing else 0


def command_of(asked: argparse.Namespace) -> str:
    """The command that repeats this, with no more options than it needs and no folder of this machine."""
    told = parser()
    words = ["python -m bench.methods", f"--output runs/{asked.output.name}"]
    for name in (
        "methods",
        "seeds",
        "epochs",
        "n",
        "attack_n",
        "attacks",
        "queries",
        "train_n",
        "teacher_epochs",
        "threads",
        "jobs",
    ):
        value = getattr(asked, name)
        if value != told.get_default(name):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
