"""The file under audit as its own twin: its graph rebuilt with gradients, and held against the runtime before it is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustkd.auditing.probes import Kind, Labels, flips, spread
from robustkd.auditing.sides import Side, read
from robustkd.bundle import Bundle
from robustkd.catalog import Shelf
from robustkd.engines._base import Images, Logits
from robustkd.engines.pytorch import device_of
from robustkd.errors import ArtifactError
from robustkd.recipe.policy import Policy
from robustkd.result import Check
from robustkd.threat import ThreatModel

NAME = "twin agreement"
#: share of equal classes below which gradients of the twin are those of another model
TRUSTED = 0.98
#: images the twin is held against the runtime on, clean and attacked
SAMPLE = 128
STEPS = 10
#: why nothing is shown where the twin is not trusted
TRANSFER = "the graph the gradients came from does not answer as the engine does, so its attacks count as transfer only"


@dataclass(frozen=True)
class Graph:
    """The rebuilt graph of a file, or why it cannot be built.

    Attributes:
        net: differentiable, roundings straight through; logarithms of probabilities where the file returns probabilities.
        why: the operator that is not covered, or what else is in the way.
    """

    net: nn.Module | None
    why: str = ""


def rebuild(file: Path, device: torch.device | str = "cpu") -> Graph:
    """The graph of an ONNX file on a device; nothing is raised for what the importer does not cover."""
    from robustkd.engines.importer.load import import_onnx

    try:
        return Graph(import_onnx(file, log_probabilities=True).to(device))
    except ArtifactError as error:
        return Graph(None, error.what)


def graph_wanted(
    file: Path,
    bundle: Bundle | None,
    *,
    net: bool,
    source: bool,
    precision: str,
    policy: Policy,
    device: torch.device | str = "cpu",
) -> Graph | None:
    """The rebuilt graph of the file under audit, or of the one its engine was built from, where gradients of it are wanted.

    Without a network or a source it is the only one that has any; beside a source it serves quantised engines, if the
    policy asks for a second twin.

    Args:
        file: under audit.
        bundle: around it.
        net: it is a network itself.
        source: there is a checkpoint to hold it against.
        precision: of the engine.
        policy: how hard the audit tries.
        device: where the graph goes.
    """
    if net or (source and not (policy.twins > 1 and precision.startswith("int8"))):
        return None
    if file.suffix != ".onnx" and bundle is not None:
        file = next((bundle.path / name for name in sorted(bundle.manifest.files) if name.endswith(".onnx")), file)
    return rebuild(file, device) if file.suffix == ".onnx" else None


def agrees(net: nn.Module, engine: Side, x: Images, y: Labels, threat: ThreatModel, kind: Kind, seed: int) -> Check:
    """Hold a rebuilt graph against the runtime on clean images and on images attacked through it.

    Args:
        net: the rebuilt graph.
        engine: what runs the file.
        x: clean images; the first `SAMPLE` are used.
        y: their labels.
        threat: the ball of the attack.
        kind: what the engine returns.
        seed: of the attack's start.
    """
    x, y = x[:SAMPLE], y[:SAMPLE]
    attack = Shelf("attacks").get("pgd")(steps=STEPS)
    images, labels = (torch.from_numpy(values).to(device_of(net)) for values in (x, y))
    found = attack.perturb(net, images, labels, threat, seed=seed).x_adv.cpu().numpy()
    rows = [_distance(net, engine, images, y, kind) for images in (x, found)]
    n, same = len(x), [len(x) - odd for odd, _ in rows]
    share = sum(same) / (2 * n)
    message = (
        f"the rebuilt graph and the engine give the same class on {same[0]} of {n} clean and {same[1]} of {n} attacked images; "
        f"the largest difference of a {'probability' if kind == 'probabilities' else 'logit'} is {max(d for _, d in rows):.2g}"
    )
    if share >= TRUSTED:
        return Check(name=NAME, status="ok", observed=share, bound=TRUSTED, message=message)
    return Check(name=NAME, status="warn", observed=share, bound=TRUSTED, message=f"{message}: {TRANSFER}")


def _distance(net: nn.Module, engine: Side, x: Images, y: Labels, kind: Kind) -> tuple[int, float]:
    """Images whose class differs beyond rounding, and the largest difference of an output."""
    theirs, ours = engine.logits(x), _answers(net, x, kind)
    odd, _ = flips(read(theirs, y), read(ours, y), spread(theirs))
    with np.errstate(invalid="ignore"):  # Inf on both sides, as half precision gives it
        gap: NDArray[np.float64] = np.abs(theirs.astype(np.float64) - ours)
    return odd, float(np.nanmax(np.where(np.isfinite(gap), gap, np.nan), initial=0.0))


@torch.no_grad()
def _answers(net: nn.Module, x: Images, kind: Kind) -> Logits:
    place = device_of(net)
    parts = [net(torch.from_numpy(np.ascontiguousarray(x[i : i + 64])).to(place)) for i in range(0, len(x), 64)]
    found = torch.cat(parts)
    if kind == "probabilities" and bool((found <= 0).all()):  # the importer gives their logarithm
        found = found.exp()
    answers: Logits = found.float().cpu().numpy()
    return answers


def not_built(graph: Graph | None, *, blind: bool) -> list[Check]:
    """The check that says why there is no twin from the graph; `blind` where nothing else has gradients."""
    if blind:
        why = f"{graph.why}; " if graph is not None else ""
        message = f"{why}white-box, replayed and surrogate attacks need the checkpoint this was made from: give a source"
        return [Check(name="white-box levels", status="skipped", message=message)]
    return [Check(name=NAME, status="skipped", message=graph.why)] if graph is not None and graph.net is None else []
