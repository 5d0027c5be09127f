"""Two small random teachers in files: enough to drive a method's state, quick enough for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from robustkd.models._files import portable
from robustkd.models.resnet18 import ENTRY as ResNet18

MODEL = {"name": "resnet18", "width": 0.0625, "stem_stride": 2}


def two_teachers(folder: Path, *, channels: int = 1, classes: int = 10) -> list[dict[str, Any]]:
    """A flat robust teacher and a sharp clean one: the `teachers` section of a recipe."""
    section = []
    for seed, (role, sharpness) in enumerate({"robust": 1.0, "clean": 4.0}.items()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = ResNet18.model_validate(MODEL).build(channels=channels, classes=classes)
        state = portable(net)
        last = [name for name in state if state[name].shape[:1] == (classes,)]
        save_file({k: sharpness * v if k in last else v for k, v in state.items()}, folder / f"{role}.safetensors")
        section.append({"role": role, "path": str(folder / f"{role}.safetensors"), "model": MODEL})
    return section
