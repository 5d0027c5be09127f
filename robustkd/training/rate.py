"""How fast a machine trains, read off a checkpoint that was trained on it; hours of another recipe follow from it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustkd.bundle import Bundle, Manifest
from robustkd.datasets._base import Facts
from robustkd.errors import ArtifactError, RobustKDError
from robustkd.recipe.schema import Recipe
from robustkd.training.cost import gmacs_of, parts_of


@dataclass(frozen=True)
class Rate:
    """What one run reached.

    Attributes:
        gmacs_per_s: 10^9 multiply-accumulates a second, over all its processes.
        machine: in words: the device, and how much of it was used.
        source: the checkpoint.
    """

    gmacs_per_s: float
    machine: str
    source: Path


def measured(checkpoint: Path) -> Rate:
    """The rate of a run: the median of the images per second that it logged, times its multiply-accumulates per image.

    Raises:
        ArtifactError: it is no checkpoint of ours, logged no speed, or its networks cannot be counted.
    """
    bundle = Bundle.open(checkpoint, kind="checkpoint")
    speeds, model = _speeds(bundle), bundle.manifest.model
    if not speeds or model is None:
        raise ArtifactError(
            "this checkpoint has no measured speed", where=str(checkpoint), fix="give one that distill has made"
        )
    told = bundle.manifest
    facts = Facts(model.input_shape, len(model.classes))
    try:
        gmacs = gmacs_of(parts_of(Recipe.model_validate(told.recipe), facts))
    except (ValueError, RobustKDError) as error:
        said = error.what if isinstance(error, RobustKDError) else str(error).partition("\n")[0]
        raise ArtifactError(
            f"the cost of this checkpoint cannot be counted: {said}", where=str(checkpoint), fix="give one of a shipped recipe"
        ) from error
    return Rate(statistics.median(speeds) * gmacs, _machine(told), checkpoint)


def _speeds(bundle: Bundle) -> list[float]:
    """Images per second as logged; the first of several is left out, for it holds the warming up."""
    file = bundle.path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    found = [float(line["images_per_s"]) for line in lines if "images_per_s" in line]
    return found[1:] or found


def _machine(told: Manifest) -> str:
    training: dict[str, Any] = (told.model_extra or {}).get("training", {})
    device = told.hardware.get("device", "cpu")
    name, used = (told.hardware.get("cpu", "cpu"), ["threads", "processes"]) if device == "cpu" else (device, ["processes"])
    counts = [f"{word}: {training[word]}" for word in used if word in training]
    return f"{name}, {', '.join(counts)}" if counts else str(name)
