"""What bench.methods compares: the rows of its table, and the one recipe they all share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustkd.api import load_recipe
from robustkd.catalog import Shelf
from robustkd.errors import ConfigError, nearest
from robustkd.recipe.schema import Recipe, TrainConfig

YARDSTICK = "pgd-at"
CLEAN_TEACHER, ROBUST_TEACHER = "teacher-clean", "teacher-robust"
CARD = "fashion-mnist-resnet18"
STRONG = "autoaugment"
#: the attacks and budgets of AutoAttack's standard set; bench.methods may leave one out, and then says so
AUTOATTACK: dict[str, dict[str, int]] = {
    "apgd-ce": {"steps": 100},
    "apgd-t": {"steps": 100, "targets": 9},
    "fab-t": {"steps": 100, "targets": 9},
    "square": {"queries": 5000},
}


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison have in common.

    Attributes:
        n: test images for clean and PGD-20 accuracy; attack_n: for AutoAttack; always the first of the test set.
        train_n: training images; None is all of them.
    """

    epochs: int = 4
    n: int = 500
    attack_n: int = 200
    attacks: tuple[str, ...] = ("apgd-ce", "apgd-t", "square")
    queries: int = 500
    threads: int = 1
    train_n: int | None = None
    teacher_epochs: int = 6

    def plain(self) -> dict[str, Any]:
        """As JSON gives it back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def read(cls, values: dict[str, Any]) -> Setting:
        """From what `plain` gave."""
        return cls(**{**values, "attacks": tuple(values["attacks"])})

    def knobs(self, attack: str) -> dict[str, int]:
        """The budget of one attack."""
        return {"queries": self.queries} if attack == "square" else AUTOATTACK[attack]


@dataclass(frozen=True)
class Row:
    """One line of the table: a method of the shelf, with the knobs in which it leaves its defaults."""

    label: str
    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def rows(epochs: int) -> dict[str, Row]:
    """Every row that can be had: each method of the shelf, then the forms that are knobs of one.

    The introspection of IAD and AdaIAD starts in epoch 60 (IAD-II: 40) of 200; here at the same share of the epochs.
    """
    late, early = round(0.3 * epochs), round(0.2 * epochs)
    found = {name: Row(name, name) for name in Shelf("methods").names()}
    gate = "introspection from epoch {} of {}, the paper's share of the schedule".format
    if "iad" in found:
        found["iad"] = Row("iad", "iad", {"gate_epoch": late}, note=gate(late, epochs))
        knobs = {"form": "iad-2", "gate_epoch": early}
        found["iad-2"] = Row("iad-2", "iad", knobs, note=gate(early, epochs))
        found["akd2"] = Row("akd2", "iad", {"form": "akd2"})
    if "adaad" in found:
        found["adaad-bmean"] = Row("adaad-bmean", "adaad", {"reduction": "bmean"}, note="AdaAD at DGAD's loss scale")
        knobs = {"introspection": True, "gate_epoch": late}
        found["adaiad"] = Row("adaiad", "adaad", knobs, note=gate(late, epochs))
    if "advfunmatch" in found and STRONG in json.dumps(TrainConfig.model_json_schema()["properties"]["augment"]):
        strong = {"augment": ["flip", STRONG]}
        found["advfunmatch-strong"] = Row("advfunmatch-strong", "advfunmatch", train=strong, note="with AutoAugment")
    return found


def choose(wanted: Iterable[str], epochs: int) -> list[Row]:
    """The rows asked for, the yardstick first.

    Raises:
        ConfigError: there is no such row.
    """
    offered = rows(epochs)
    for label in (wanted := list(wanted)):
        if label not in offered:
            raise ConfigError(f"{label} is neither a method nor a form of one", fix=nearest(label, offered))
    return sorted((offered[label] for label in wanted), key=lambda row: row.label != YARDSTICK)


def recipe_for(row: Row, seed: int, setting: Setting, clean_teacher: Path) -> Recipe:
    """The quickstart's student and data with this method; every method searches the threat's own ball."""
    base = load_recipe("quickstart").model_dump(mode="json")
    method = {"name": row.method, **row.knobs}
    entry = Shelf("methods").get(row.method)
    sources = {"robust": {"id": CARD}, "clean": {"path": str(clean_teacher)}}
    roles = entry.roles_for(entry.Config.model_validate(method))
    values = {
        **base,
        "name": f"{row.label}-s{seed}",
        "teachers": [{"role": role, **sources[role]} for role in roles],
        "inner": {"steps": 2, "step_size": "5/255"},
        "method": method,
        "train": {**_train(base, setting), "epochs": setting.epochs, **row.train},
        "seed": seed,
    }
    if not entry.adversarial:
        values["train"]["select"] = "clean"  # it has no robustness to select by
    return Recipe.model_validate(_cut(values, setting))


def clean_recipe(setting: Setting) -> Recipe:
    """The clean teacher: the robust teacher's architecture, trained without a defence on the same images."""
    base = load_recipe("quickstart").model_dump(mode="json")
    values = {
        **base,
        "name": CLEAN_TEACHER,
        "student": load_recipe("teacher-fashion-mnist").student.model_dump(mode="json"),
        "teachers": [],
        "inner": {},
        "method": {"name": "standard"},
        "train": {**_train(base, setting), "epochs": setting.teacher_epochs, "select": "clean"},
        "seed": 0,
    }
    return Recipe.model_validate(_cut(values, setting))


def _train(base: dict[str, Any], setting: Setting) -> dict[str, Any]:
    return {**base["train"], "augment": ["flip"], "threads": setting.threads, "tensorboard": False, "device": "cpu"}


def _cut(values: dict[str, Any], setting: Setting) -> dict[str, Any]:
    return {**values, "dataset": {**values["dataset"], "train_n": setting.train_n}}
