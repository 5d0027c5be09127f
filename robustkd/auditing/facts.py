"""What an audit is about and what it leaves besides its result. Needs no torch: a board audits with a kit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robustkd.auditing.ledger import Ledger
from robustkd.auditing.store import Store
from robustkd.engines._base import Images

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ArtifactFacts:
    """The file under audit."""

    path: str
    sha256: str


@dataclass(frozen=True)
class SourceModel:
    """The checkpoint the artifact is held against; its gradients serve as the twin's."""

    net: nn.Module
    path: str
    sha256: str


@dataclass(frozen=True)
class AuditArrays:
    """What the result does not hold: the images, and every answer to them."""

    x: Images
    y: NDArray[np.int64]
    index: NDArray[np.int64]
    ledger: Ledger
    store: Store
