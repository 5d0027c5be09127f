"""What a recipe costs per training image, in giga-MACs, from its networks and the passes its method makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from robustkd.methods._cost import cost_of
from robustkd.models._base import ModelConfig
from robustkd.recipe.schema import Recipe
from robustkd.training.teachers import read_card


def giga_macs(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> float:
    """Multiply-accumulates of one forward pass over one image, convolutions and linear layers, in 10^9."""
    with torch.device("meta"):  # shapes only
        net = config.build(channels=shape[0], classes=classes).eval()
        total = [0]

        def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            # each element of the output is a sum over one filter, or one row of the matrix
            total[0] += output.numel() * module.weight[0].numel()  # type: ignore[operator,index]

        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        net(torch.empty(1, *shape))
    return total[0] / 1e9


def cost_of_recipe(recipe: Recipe) -> list[tuple[str, int, float]]:
    """(who, passes, giga-MACs of one pass) of the student and of each teacher, for data whose shape is known.

    A pass is one forward; a gradient to the input counts one more, a full backward two more (methods.md, 1.7).
    """
    facts = recipe.dataset.facts
    assert facts is not None, "only recipes of published data are counted"
    cost = cost_of(recipe.method.name, steps=recipe.inner.steps)
    parts = [("student", cost.student, giga_macs(recipe.student, facts.shape, facts.classes))]
    for teacher in recipe.teachers:
        model = read_card(str(teacher.id)).model
        passes = cost.teachers[teacher.role]
        parts.append((f"{teacher.role} teacher", passes, giga_macs(model, facts.shape, facts.classes)))
    return parts


def three(value: float) -> str:
    """A number to three digits, as the heads of the recipes have it: 588, 28.8, 2.19, 0.0912."""
    return f"{float(f'{value:.3g}'):g}"


def cost_line(recipe: Recipe) -> str:
    """The sentence on cost in a recipe's head."""
    parts = cost_of_recipe(recipe)
    total = three(sum(passes * each for _, passes, each in parts))
    made_of = " + ".join(f"{who} {passes} x {three(each)}" for who, passes, each in parts)
    return f"{total} GMACs per training image ({made_of})"
