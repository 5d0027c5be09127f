"""The two sides of an audit, and the one rule that judges them.

An image is robust only if every image tried for it gets finite logits and the label wins by a strictly positive
margin: a tie, a NaN or an Inf is never a point for the defender.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkd.engines._base import Engine, Images, Logits
from robustkd.signals import check

if TYPE_CHECKING:
    import torch
    from torch import nn

#: prediction recorded where the logits are not finite
NO_NUMBER = -1
#: prediction recorded where an attack did not try an image
NOT_TRIED = -2

Answer = Callable[[Images], Logits]


class Judged(NamedTuple):
    """The answers to a batch: predicted class (or NO_NUMBER) and margin of the label (-inf where not finite)."""

    prediction: NDArray[np.int64]
    margin: NDArray[np.float64]

    @property
    def robust(self) -> NDArray[np.bool_]:
        """Finite logits and a strictly positive margin."""
        flags: NDArray[np.bool_] = self.margin > 0
        return flags


def read(logits: Logits, y: NDArray[np.int64]) -> Judged:
    """Judge logits (N, K) against labels (N,)."""
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=1))
    safe = np.where(finite[:, None], logits, 0.0).astype(np.float64)
    rows = np.arange(len(y))
    rest = safe.copy()
    rest[rows, y] = -np.inf
    margin = np.where(finite, safe[rows, y] - rest.max(axis=1, initial=-np.inf), -np.inf)
    return Judged(np.where(finite, safe.argmax(axis=1), NO_NUMBER).astype(np.int64), margin)


class Side:
    """One side under audit: answers, in batches, and a count of the images it answered.

    Args:
        answer: images to logits, or to what stands for them.
        batch_size: images at a time.
        slack: how far two margins of the same image may lie apart by chance; 0 for an engine that is not random.
        draws: answers to each image that make one.
        scores: the side whose logits a loss is made of; left out, this one.
    """

    def __init__(
        self, answer: Answer, batch_size: int, *, slack: float = 0.0, draws: int = 1, scores: Side | None = None
    ) -> None:
        self._answer, self._batch, self.images = answer, batch_size, 0
        self._one = threading.Lock()  # chunks that are attacked at once ask one after another: an engine may keep a state
        self.slack, self.draws, self.scores = slack, draws, scores or self

    def logits(self, x: Images, batch: int | None = None) -> Logits:
        """Logits of any number of images, cut into batches."""
        parts = []
        for first in range(0, len(x), batch or self._batch):
            check()
            part = x[first : first + (batch or self._batch)]
            self.images += len(part)
            images = np.array(part, order="C")  # one image of a reversed array passes for contiguous, but not in torch
            with self._one:
                parts.append(np.array(self._answer(images), dtype=np.float32, copy=True))
        return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)

    def judge(self, x: Images, y: NDArray[np.int64], batch: int | None = None) -> Judged:
        """Judge images against their labels."""
        if not len(x):
            return Judged(np.zeros(0, np.int64), np.zeros(0))
        return read(self.logits(x, batch), y)


def engine_side(engine: Engine, batch_size: int) -> Side:
    """The artifact under audit."""
    return Side(engine.logits, batch_size)


def source_side(net: nn.Module, device: torch.device, batch_size: int) -> Side:
    """The checkpoint the artifact is held against."""
    import torch

    @torch.no_grad()
    def answer(x: Images) -> Logits:
        found: Logits = net(torch.from_numpy(x).to(device)).float().cpu().numpy()
        return found

    return Side(answer, batch_size)
