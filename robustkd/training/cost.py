"""What a run costs, counted before it begins: multiply-accumulates per image, images, and both together.

Hours follow from a rate, which is measured (`rate.py`) and never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from robustkd.datasets._base import Facts
from robustkd.errors import RobustKDError
from robustkd.methods._cost import cost_of
from robustkd.models._base import ModelConfig
from robustkd.models._macs import giga_macs
from robustkd.recipe.schema import Recipe, TeacherConfig
from robustkd.training.teachers import read_card

if TYPE_CHECKING:
    from robustkd.training.rate import Rate


@dataclass(frozen=True)
class Part:
    """One network of a step: passes per training image (methods.md, 1.7), and 10^9 multiply-accumulates of one pass.

    A pass is one forward; a gradient to the input counts one more, a full backward two more.
    """

    who: str
    passes: int
    gmacs: float


def parts_of(recipe: Recipe, facts: Facts | None = None) -> list[Part]:
    """The student and each teacher; add-ons are not counted.

    Args:
        recipe: the recipe.
        facts: of the data; left out, what is known before they are read.

    Raises:
        ValueError: the shape of the data, or a teacher's architecture, is not known yet.
        RobustKDError: a network cannot be built here.
    """
    facts = facts or recipe.dataset.facts
    if facts is None:
        raise ValueError(f"the images of {recipe.dataset.name} are known once they are read")
    cost = cost_of(recipe.method.name, steps=recipe.inner.steps, knobs=recipe.method.model_dump(exclude={"name"}))
    parts = [Part("student", cost.student, giga_macs(recipe.student, facts.shape, facts.classes))]
    for teacher in recipe.teachers:
        each = giga_macs(_architecture(teacher), facts.shape, facts.classes)
        parts.append(Part(f"{teacher.role} teacher", cost.teachers[teacher.role], each))
    return parts


def gmacs_of(parts: list[Part]) -> float:
    """10^9 multiply-accumulates of one training image."""
    return sum(part.passes * part.gmacs for part in parts)


def _architecture(teacher: TeacherConfig) -> ModelConfig:
    if teacher.id is not None:
        return read_card(teacher.id).model
    if teacher.model is None:
        raise ValueError(f"the architecture of {teacher.path} is known once it is read")
    return teacher.model


def images_of(recipe: Recipe) -> tuple[int, str] | None:
    """How many images a whole run trains on, repetitions counted, and how they come about; None where the data are unread."""
    facts, data, epochs = recipe.dataset.facts, recipe.dataset, recipe.train.epochs
    if facts is None or facts.train is None:
        return None
    each = facts.train - min(data.holdout, facts.train // 2)
    each = each if data.train_n is None else min(each, data.train_n)
    return epochs * each, f"{epochs} epochs of {each:,}"


def told(recipe: Recipe, name: str, rate: Rate | None = None) -> list[str]:
    """The cost of a recipe in lines for people.

    Args:
        recipe: the recipe.
        name: what to call it in a command.
        rate: what a machine reached; hours are told for it alone.
    """
    try:
        parts = parts_of(recipe)
    except (ValueError, RobustKDError) as error:
        return [f"cost: not counted: {error.what if isinstance(error, RobustKDError) else error}"]
    total = gmacs_of(parts)
    made_of = " + ".join(f"{part.who} {part.passes} x {three(part.gmacs)}" for part in parts)
    lines = [f"cost: {three(total)} GMACs per training image ({made_of})"]
    if (images := images_of(recipe)) is not None:
        lines.append(f"images: {images[0]:,} ({images[1]}); {three(total * images[0] / 1e6)} x 10^15 MACs in all")
    if any(value is not None for value in recipe.addons.model_dump().values()):
        lines.append("add-ons are not counted")
    if rate is not None and images is not None:
        hours = total * images[0] / rate.gmacs_per_s / 3600
        reached = f"the {three(rate.gmacs_per_s)} GMACs a second of {rate.source} on {rate.machine}"
        return [*lines, f"hours: {three(hours)} at {reached}", "  nearly so for the same networks, roughly for others"]
    lines += [
        "hours: the rate is to be measured where it is to run:",
        f"  robustkd distill --recipe {name} --set train.epochs=1 --set dataset.train_n=2000 --output short",
        f"  robustkd show recipe {name} --measured short/checkpoint",
    ]
    return lines


def three(value: float) -> str:
    """A number to three digits, as the heads of the recipes have it: 588, 28.8, 2.19, 0.0912."""
    return f"{float(f'{value:.3g}'):g}"
