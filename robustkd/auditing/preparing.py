"""What an audit prepares before its attacks: the models they work on, the networks that judge, the clean answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkd.attacks._base import Model
from robustkd.auditing import probes
from robustkd.auditing.facts import SourceModel
from robustkd.auditing.quick import Own, White, quick
from robustkd.auditing.sides import Judged, Side, source_side
from robustkd.auditing.stochastic import DRAWS, majority_side
from robustkd.auditing.store import Store
from robustkd.auditing.twin import Expectation, Values, tame, tamed, varies
from robustkd.datasets._base import ImageSet
from robustkd.engines._base import Engine, Images
from robustkd.engines.pytorch import PytorchEngine
from robustkd.recipe.policy import AuditConfig


def models_of(
    engine: Engine,
    net: nn.Module | None,
    source: SourceModel | None,
    second: nn.Module | None,
    kind: probes.Kind,
    x: Tensor,
    *,
    random: bool,
    asked: Callable[[nn.Module], int] | None = None,
    exact: bool = False,
) -> dict[str, Model]:
    """What each kind of attack works on; a `random` engine's networks may be random too, then their mean leads.

    Networks are made as quick as they can be had, unless they shall be `exact`; more so where they are `asked` for answers
    without gradients many times, by so many threads each time.
    """

    @cache
    def lead(other: nn.Module) -> nn.Module:
        if random and varies(other, x):
            return Expectation(other, DRAWS)
        return other if exact else quick(other, x, asked=asked)

    one = net is not None and kind == "logits" and isinstance(engine, PytorchEngine) and engine.net is net
    values = Own(engine, lead(net)) if net is not None and one else Values(engine, probabilities=kind == "probabilities")
    models: dict[str, Model] = {"engine": values}
    if net is not None:
        # labels have no slope: there the twin's own loss leads, and the engine only judges
        model = tame(lead(net) if kind == "labels" else values, lead(net), x)
        models["surrogate"] = White(values, lead(net), value_scale=model.value_scale) if one else model
    if second is not None:
        models["twin"] = tame(values, lead(second), x)
    if source is not None:
        models["source"] = tamed(lead(source.net), x)
    return models


def network_side(net: nn.Module, device: torch.device, images: ImageSet, audit: AuditConfig) -> Side:
    """How a network is judged: by majority where it is random and the engine is declared to be."""
    side = source_side(net, device, audit.batch_size)
    some = torch.from_numpy(images.take(np.arange(min(16, len(images)))).floats()).to(device)
    if not (audit.stochastic and varies(net, some)):
        return side
    return majority_side(side.logits, audit.batch_size)


def clean_answers(engine: Side, x: Images, y: NDArray[np.int64], store: Store) -> Judged:
    """Clean answers by majority, kept: a resumed audit would be given others."""
    piece = store.get("clean")
    if piece is None:
        piece = engine.judge(x, y)._asdict()
        store.put("clean", piece)
    return Judged(piece["prediction"], piece["margin"])
