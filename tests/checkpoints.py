"""A checkpoint bundle without the minutes of training: right in form, on the embedded data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from robustkd.bundle import Bundle, ModelInfo, create
from robustkd.catalog import Shelf
from robustkd.models._files import portable
from robustkd.threat import ThreatModel

STUDENT = {"name": "resnet18", "width": 0.0625, "stem_stride": 2}
CLASSES = tuple(str(c) for c in range(10))


def write_checkpoint(path: Path, **fields: Any) -> Bundle:
    """A small student with batch statistics of its own; `fields` go into the manifest."""
    torch.manual_seed(0)
    net = Shelf("models").get("resnet18").model_validate(STUDENT).build(channels=1, classes=10).train()
    with torch.no_grad():
        net(torch.rand(64, 1, 28, 28))
    told: dict[str, Any] = {
        "recipe": {"student": STUDENT, "dataset": {"name": "fashion-mnist-10k"}},
        "model": ModelInfo(architecture="resnet18", classes=CLASSES, input_shape=(1, 28, 28)),
        "threat": ThreatModel(),
        **fields,
    }
    with create(path, "checkpoint", **told) as (folder, _):
        save_file(portable(net), folder / "model.safetensors")
    return Bundle.open(path, kind="checkpoint")
