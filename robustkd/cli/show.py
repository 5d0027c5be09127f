"""`robustkd show`: one recipe, target, teacher or method in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from robustkd.errors import ConfigError, nearest


def show(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="recipe, target, teacher or method.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name, or a path to your own YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="Show a recipe as it is with this setting."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Tell a recipe's hours at the rate this checkpoint was trained at."),
    ] = None,
) -> None:
    """Show a recipe resolved, with the origin of each value and its cost; or a target, a teacher's card, a method."""
    kinds = ("recipe", *_KINDS)
    if kind not in kinds:
        raise ConfigError(f"there is no {kind} to show", fix=nearest(kind, kinds))
    if settings and kind != "recipe":
        raise ConfigError("--set changes recipes only", where=f"robustkd show {kind} {name}", fix="leave --set out")
    if measured and kind != "recipe":
        raise ConfigError("--measured is for recipes", where=f"robustkd show {kind} {name}", fix="leave --measured out")
    typer.echo(_recipe(name, settings or [], measured) if kind == "recipe" else _KINDS[kind](name))


def _recipe(name: str, settings: list[str], checkpoint: Path | None) -> str:
    from robustkd.cli._origins import annotated
    from robustkd.recipe.reading import override, read, validate
    from robustkd.recipe.schema import Recipe
    from robustkd.training.cost import told
    from robustkd.training.rate import measured

    source = override(read("recipe", name), settings)
    recipe = validate(Recipe, source)
    rate = measured(checkpoint) if checkpoint else None
    cost = [f"# {line}" for line in told(recipe, name, rate)]
    return "\n".join([annotated(recipe.model_dump(mode="json"), source), "", *cost])


def _target(name: str) -> str:
    from robustkd.cli._origins import annotated
    from robustkd.recipe.reading import read, validate
    from robustkd.recipe.target import Target

    source = read("target", name)
    return annotated(validate(Target, source).model_dump(mode="json"), source)


def _teacher(name: str) -> str:
    from robustkd.cli._teachers import teacher_text

    return teacher_text(name)


def _method(name: str) -> str:
    from robustkd.catalog import Shelf
    from robustkd.cli._stock import UNIT, cost_text, method_facts, teachers_of, through_of
    from robustkd.resources import shipped

    method: Any = Shelf("methods").get(name)
    facts = method_facts(name, method)
    users = [recipe for recipe in shipped("recipe") if _method_of(recipe) == name]
    lines = [
        f"{name}: {method.summary}",
        f"paper: {method.paper}",
        f"equation: {method.equation}",
        f"teachers: {teachers_of(facts)}",
        f"gradient through teacher: {through_of(facts)}",
        f"relative cost: {cost_text(facts)} ({UNIT})",
        f"departures: {method.departures}",
        "knobs:",
        *(f"  {knob}" for knob in _knobs(method)),
        f"recipes: {', '.join(users) or 'none ships'}",
    ]
    return "\n".join(lines)


def _knobs(method: Any) -> list[str]:
    fields = {name: info for name, info in method.Config.model_fields.items() if name != "name"}
    if not fields:
        return ["none"]
    return [
        f"{name} = {info.get_default(call_default_factory=True)}  {info.description or ''}".rstrip()
        for name, info in fields.items()
    ]


def _method_of(recipe: str) -> Any:
    """The method a shipped recipe names, read without validating it."""
    from robustkd.recipe.reading import read

    method = read("recipe", recipe).values.get("method")
    return method.get("name") if isinstance(method, dict) else method


_KINDS: dict[str, Callable[[str], str]] = {
    "target": _target,
    "teacher": _teacher,
    "method": _method,
}
