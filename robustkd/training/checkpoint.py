"""The resumable state of a run: one safetensors file, written atomically, holding all that the next step needs.

Student, its running average, momentum buffers and the best student so far are tensors; everything else is JSON in the
file's header.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkd.bundle import write_atomic
from robustkd.errors import ArtifactError
from robustkd.models._base import bare
from robustkd.models._files import portable
from robustkd.training.average import Average


@dataclass
class Progress:
    """Where a run stands. `step` is the next step within `epoch`."""

    epoch: int = 0
    step: int = 0
    best_score: float = -1.0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    method_state: dict[str, Any] = field(default_factory=dict)
    averaged: int = 0
    metrics_bytes: int = 0
    threads: int = 1
    seconds: float = 0.0


def save(
    file: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    progress: Progress,
    average: Average | None = None,
) -> None:
    """Write the whole state; the old file stays until the new one is complete."""
    from safetensors.torch import save as pack

    tensors = {f"student.{k}": v for k, v in portable(net).items()}
    tensors |= {f"best.{k}": v for k, v in best.items()}
    if average is not None:
        progress.averaged = average.taken
        tensors |= {f"average.{k}": v for k, v in portable(average.net).items()}
    for name, parameter in bare(net).named_parameters():
        if (momentum := optimizer.state[parameter].get("momentum_buffer")) is not None:
            tensors[f"momentum.{name}"] = momentum.detach().cpu().contiguous().clone()
    write_atomic(file, pack(tensors, metadata={"progress": json.dumps(asdict(progress))}))


def restore(
    file: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> tuple[dict[str, Tensor], Progress]:
    """Load the state back into student, optimiser and average.

    Returns:
        The best student so far, and where the run stands.

    Raises:
        ArtifactError: the file is damaged or belongs to another student.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            progress = Progress(**json.loads(opened.metadata()["progress"]))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the saved state cannot be read: {error}", where=str(file), fix="start again without --resume"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "best": {}, "momentum": {}, "average": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    try:
        bare(net).load_state_dict(parts["student"])
        if average is not None:
            bare(average.net).load_state_dict(parts["average"])
            average.taken = progress.averaged
    except RuntimeError as error:
        raise ArtifactError(
            "the saved state belongs to another student", where=str(file), fix=str(error).splitlines()[0]
        ) from error
    for name, parameter in bare(net).named_parameters():
        if name in parts["momentum"]:
            buffer = parts["momentum"][name].to(parameter.device)
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
    return parts["best"], progress
