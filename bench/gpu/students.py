"""The same students by several methods from one teacher, with the same budget: a table as JSON and Markdown.

    python -m bench.gpu.students --data DATA --output OUT --teacher ZOO/teacher.safetensors [--clean-teacher FILE] [--minutes 9]

The same command goes on until it ends with 0 (75: the time was up); what is measured is not run again. Methods and students
are those of the shipped recipes METHOD-STUDENT, with teacher, epochs, schedule and precision of this table instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu import measure
from bench.gpu.common import (
    AGAIN,
    Clock,
    Failed,
    TimeUp,
    data_set,
    graceful,
    parser,
    percent,
    read,
    save,
    say,
    setting,
    table,
    told,
    write_text,
)
from robustkd.catalog import Shelf

METHODS = ("dgad", "adaad", "rslad", "ard", "b-mtard", "advfunmatch", "pgd-at", "trades")
STUDENTS = ("mnv2", "rn18")
COLUMNS = ("clean", "fgsm", "pgd10", "pgd20", "autoattack")
DRY = {
    "mnv2": "student={name: mobilenet-v2, width: 0.125}",
    "rn18": "student={name: resnet18, width: 0.0625, stem_stride: 2}",
}
DRY_MODEL = {"name": "resnet18", "width": 0.0625, "stem_stride": 2}


def main(argv: list[str]) -> int:
    asked = options().parse_args(argv)
    graceful()
    clock, data, command = Clock(asked.minutes), data_set(asked), told("students", argv)
    jobs = [(method, student) for student in asked.students for method in asked.methods]
    with ThreadPoolExecutor(asked.jobs) as pool:
        states = list(pool.map(lambda job: attempt(*job, asked, clock, data), jobs))
    rows = {f"{method}-{student}": row for (method, student), row in zip(jobs, states, strict=True)}
    save(asked.output, "students", {"budget": budget(asked), "rows": rows}, command)
    write_text(asked.output / "students.md", page(rows, asked))
    say(f"{sum(row['status'] == 'done' for row in rows.values())} of {len(rows)} are done")
    if any(row["status"] == "failed" for row in rows.values()):
        return 1
    return AGAIN if any(row["status"] == "unfinished" for row in rows.values()) else 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    given = parser(__doc__)
    given.add_argument("--teacher", type=Path, help="weights or checkpoint of the robust teacher; --dry makes one of noise")
    given.add_argument("--teacher-model", type=json.loads, default={"name": "resnet18"}, help="its architecture, as JSON")
    given.add_argument("--clean-teacher", type=Path, help="of the methods with two; without it they are left out")
    given.add_argument("--clean-model", type=json.loads, default={"name": "resnet18"}, help="its architecture, as JSON")
    given.add_argument("--methods", type=names, default=METHODS)
    given.add_argument("--students", type=names, default=STUDENTS)
    given.add_argument("--epochs", type=int, default=30)
    given.add_argument("--batch-size", type=int, default=256)
    given.add_argument("--lr", type=float, default=0.2)
    given.add_argument("--set", action="append", default=[], metavar="K=V", help="over every recipe")
    given.add_argument("--jobs", type=int, default=1, help="students at a time on the one GPU; small ones leave it idle")
    given.add_argument("--n", type=int, default=5000, help="test images for clean, FGSM and PGD")
    given.add_argument("--attack-n", type=int, default=1000, help="test images for AutoAttack")
    return given


def names(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def attempt(method: str, student: str, asked: argparse.Namespace, clock: Clock, data: dict[str, Any]) -> dict[str, Any]:
    """One row, from where an earlier call left it."""
    folder = asked.output / f"{method}-{student}"
    if found := read(folder / "measured.json"):
        return found
    roles = {str(role) for role in Shelf("methods").get(method).roles}
    if "clean" in roles and asked.clean_teacher is None and not asked.dry:
        return {"status": "left out", "why": "it wants a clean teacher too: --clean-teacher"}
    if "robust" in roles and asked.teacher is None and not asked.dry:
        return {"status": "left out", "why": "it wants a teacher: --teacher"}
    try:
        made = clock.distill(folder / "run", *recipe(method, student, roles, asked, data))
        figures = measure.figures(made, data, 40 if asked.dry else asked.n)
        n = 8 if asked.dry else asked.attack_n
        figures["autoattack"] = measure.autoattack(clock, made, folder / "audit", data, n, dry=asked.dry)
    except TimeUp:
        return {"status": "unfinished"}
    except Failed as error:
        return {"status": "failed", "why": str(error)}
    selected = json.loads((made / "manifest.json").read_bytes())
    row = {"status": "done", "figures": figures, "training": selected.get("training"), "selected": selected.get("selected")}
    save(folder, "measured", row, [])
    return row


def recipe(method: str, student: str, roles: set[str], asked: argparse.Namespace, data: dict[str, Any]) -> list[Any]:
    """The words of `robustkd distill`: the shipped recipe with this table's teacher and budget."""
    teachers = []
    for role, file, model in (
        ("robust", asked.teacher, asked.teacher_model),
        ("clean", asked.clean_teacher, asked.clean_model),
    ):
        if role in roles:
            path = file or noise(asked.output / f"noise-{role}.safetensors")
            teachers.append(
                {"role": role, "path": str(path.resolve()), "model": DRY_MODEL if asked.dry and not file else model}
            )
    words: list[Any] = ["--recipe", f"{method}-{student}", *setting("name", f"{method}-{student}")]
    for key in ("name", "train", "test"):
        words += setting(f"dataset.{key}", data[key])
    if teachers:
        words += setting("teachers", teachers)
    train = {
        "epochs": asked.epochs,
        "batch_size": asked.batch_size,
        "lr": asked.lr,
        "nesterov": True,
        "weight_decay": 5e-4,
        "precision": "bf16",
        "select": "pgd10",
        "select_every": 2,
        "save_every": 50,
        "tensorboard": False,
        "verify_teacher": False,
        "schedule": {"name": "onecycle", "warmup": max(1, asked.epochs // 4)},
    }
    if asked.dry:
        train |= {"epochs": 1, "batch_size": 50, "threads": 1, "save_every": 2, "schedule": {"name": "onecycle", "warmup": 1}}
        words += ["--set", DRY[student], "--set", "inner.steps=1", "--set", "dataset.holdout=20"]
    for key, value in train.items():
        words += setting(f"train.{key}", value)
    words += setting("inner.precision", "bf16")
    return [*words, *(word for value in asked.set for word in ("--set", value))]


def noise(file: Path) -> Path:
    """A teacher of random weights, for dry runs."""
    if not file.is_file():
        import torch
        from safetensors.torch import save_file

        from robustkd.models._files import portable

        torch.manual_seed(0)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(portable(Shelf("models").get("resnet18")(**DRY_MODEL).build(channels=1, classes=10)), file)
    return file


def budget(asked: argparse.Namespace) -> dict[str, Any]:
    """What every row has in common."""
    keys = ("epochs", "batch_size", "lr", "n", "attack_n", "set", "teacher_model", "clean_model", "dry")
    return {key: getattr(asked, key) for key in keys}


def page(rows: dict[str, dict[str, Any]], asked: argparse.Namespace) -> str:
    """The table for people."""
    head = ["method-student", *COLUMNS, "minutes"]
    lines = []
    for name, row in rows.items():
        figures = row.get("figures", {})
        minutes = (row.get("training") or {}).get("seconds")
        state = [percent(figures.get(key)) for key in COLUMNS] if figures else [row.get("why", row["status"])] + [""] * 4
        lines.append([name, *state, f"{minutes / 60:.1f}" if minutes else "-"])
    top = (
        f"{asked.epochs} epochs, batches of {asked.batch_size}, one-cycle to {asked.lr:g}, bf16, seed 0. Percent with 95 % "
        f"intervals: {asked.n} test images, AutoAttack (standard) on {asked.attack_n}. The papers train for 200 epochs and "
        "more in fp32, and their PGD counts the last step; ours counts an image broken where any step breaks it.\n\n"
    )
    return ("A dry run: the figures mean nothing.\n\n" if asked.dry else "") + top + table(head, lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
