"""What an installation has to offer, by kind: names with one line each. Used by `list` and `show`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkd.errors import ArtifactError, ConfigError, RequirementError, nearest

if TYPE_CHECKING:
    from robustkd.resources import Kind

#: what `list` calls a shelf -> its folder in the package
SHELVES = {
    "methods": "methods",
    "students": "models",
    "datasets": "datasets",
    "attacks": "attacks",
    "engines": "engines",
}
#: what the numbers of a method's cost are
UNIT = "forward passes per training image in a 10-step attack; a gradient to the input counts 1 more, a full one 2 more"
#: what `list` calls a kind of YAML file that ships -> that kind
SHIPPED: dict[str, Kind] = {"recipes": "recipe", "targets": "target", "policies": "policy"}
KINDS = ("methods", "recipes", "targets", "teachers", "students", "datasets", "attacks", "engines", "policies")


def stock(kind: str) -> list[dict[str, Any]]:
    """Name and summary of everything of a kind, and of methods what they ask for.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind == "methods":
        return _methods()
    if kind in SHELVES:
        return _entries(SHELVES[kind])
    if kind in SHIPPED:
        from robustkd.resources import shipped

        files = shipped(SHIPPED[kind])
        rows: list[dict[str, Any]] = [{"name": name, "summary": headline(file)} for name, file in sorted(files.items())]
        return _able(rows) if kind == "targets" else rows
    if kind == "teachers":
        from robustkd.cli._teachers import teacher_rows

        return teacher_rows()
    raise ConfigError(f"there is nothing called {kind} to list", fix=nearest(kind, KINDS))


def _able(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each target can be built and run on this machine; `cannot_build` and `cannot_run` say why not."""
    from robustkd.exporting.trt.machine import ability, this_machine
    from robustkd.recipe.target import read_target

    machine = this_machine()
    found = [ability(read_target(row["name"]), machine) for row in targets]
    return [row | able._asdict() for row, able in zip(targets, found, strict=True)]


def _methods() -> list[dict[str, Any]]:
    from robustkd.catalog import Shelf

    shelf = Shelf("methods")
    return [{"name": name, **method_facts(name, shelf.get(name))} for name in shelf.names()]


def method_facts(name: str, method: Any) -> dict[str, Any]:
    """What a method asks for. `cost` is per training image, None where a package that it needs is missing."""
    from robustkd.methods._cost import cost_of

    try:
        cost = asdict(cost_of(name))
    except RequirementError:
        cost = None
    return {
        "summary": _summary(method),
        "teachers": list(method.roles),
        "through_teacher": bool(method.through_teacher),
        "cost": cost,
        "paper": method.paper,
    }


def teachers_of(facts: dict[str, Any]) -> str:
    """The roles of the teachers a method wants, for people."""
    return " and ".join(facts["teachers"]) or "none"


def through_of(facts: dict[str, Any]) -> str:
    """Whether the attack's gradient goes through the teacher, for people."""
    return ("yes" if facts["through_teacher"] else "no") if facts["teachers"] else "-"


def cost_text(facts: dict[str, Any]) -> str:
    """A method's cost, for people: `24 student + 22 robust`."""
    cost = facts["cost"]
    if cost is None:
        return "unknown: a package is missing"
    return " + ".join([f"{cost['student']} student", *(f"{n} {role}" for role, n in cost["teachers"].items())])


def _entries(shelf: str) -> list[dict[str, Any]]:
    from robustkd.catalog import Shelf

    entries = Shelf(shelf)
    return [{"name": name, "summary": _summary(entries.get(name))} for name in entries.names()]


def _summary(entry: Any) -> str:
    """The entry's own `summary`, or the first line of its docstring."""
    own = getattr(entry, "summary", "") or getattr(entry, "__doc__", "") or ""
    return str(own).strip().partition("\n")[0]


def headline(file: Path) -> str:
    """The first comment of a YAML file: what it is for."""
    first = file.read_text(encoding="utf-8").lstrip().partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def head(text: str) -> str:
    """The block of comment lines a YAML file opens with, newline included."""
    lines = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines).strip() + "\n" if any(lines) else ""


def cards() -> dict[str, Path]:
    """The cards of the teachers that ship with robustkd."""
    import robustkd

    folder = Path(robustkd.__file__).parent / "teachers"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def card(name: str) -> dict[str, Any]:
    """The content of a teacher's card.

    Raises:
        ConfigError: no teacher has this name.
        ArtifactError: the card is damaged.
    """
    import yaml

    files = cards()
    if name not in files:
        fix = nearest(name, files) if files else "this installation ships no teachers"
        raise ConfigError(f"there is no teacher {name}", fix=fix)
    content = yaml.safe_load(files[name].read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ArtifactError("a teacher card holds no mapping", where=str(files[name]), fix="install robustkd again")
    return content
