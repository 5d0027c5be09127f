"""What a recipe costs per training image, in giga-MACs, as its head has it."""

from __future__ import annotations

from robustkd.models._macs import giga_macs
from robustkd.recipe.schema import Recipe
from robustkd.training.cost import parts_of, three

__all__ = ["cost_line", "giga_macs"]


def cost_line(recipe: Recipe) -> str:
    """The sentence on cost in a recipe's head."""
    parts = parts_of(recipe)
    total = three(sum(part.passes * part.gmacs for part in parts))
    made_of = " + ".join(f"{part.who} {part.passes} x {three(part.gmacs)}" for part in parts)
    return f"{total} GMACs per training image ({made_of})"
