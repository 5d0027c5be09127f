"""Engines that are random and say so: the mean of several draws leads the attacks, their majority is the answer.

Expectation over transformation, as Athalye, Carlini and Wagner (ICML 2018) break randomised defences: a single draw
misleads an attack by its noise and a judge by its luck. A board runs this too: no torch.
"""

from __future__ import annotations

from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from robustkd.auditing.sides import Answer, Side, engine_side
from robustkd.engines._base import Engine, Images, Logits
from robustkd.result import PerDraw

#: answers to each image
DRAWS = 16
#: vote margins of the same image differ by up to this for a reason that is chance: three standard deviations
SLACK = 1.0


class Mean:
    """An engine whose logits are the mean of several draws; NaN where one of them is not finite."""

    def __init__(self, engine: Engine, draws: int = DRAWS) -> None:
        self.info, self._engine, self._draws = engine.info, engine, draws

    def logits(self, x: Images) -> Logits:
        """(N, C, H, W) in [0, 1] to (N, K)."""
        found = [np.array(self._engine.logits(x), dtype=np.float64, copy=True) for _ in range(self._draws)]
        mean: Logits = np.mean(found, axis=0).astype(np.float32)
        return mean

    def __enter__(self) -> Mean:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def votes(answer: Answer, draws: int = DRAWS) -> Answer:
    """Shares of the draws that answer each class, in place of logits; NaN where a draw is not finite.

    The rule of `read` then asks for what it should: more votes than any other class has, never a tie.
    """

    def count(x: Images) -> Logits:
        shares: NDArray[np.float32] | None = None
        for _ in range(draws):
            logits = np.asarray(answer(x))
            if shares is None:
                shares = np.zeros(logits.shape, np.float32)
            finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=1))
            top = np.where(finite[:, None], logits, 0).argmax(axis=1) if logits.size else np.zeros(len(x), np.int64)
            shares[np.arange(len(x)), top] += 1
            shares[~finite] = np.nan
        found: Logits = shares / np.float32(draws) if shares is not None else np.zeros((len(x), 1), np.float32)
        return found

    return count


def majority_side(answer: Answer, batch_size: int, mean: Answer | None = None, draws: int = DRAWS) -> Side:
    """A side that answers by majority; its scores are the `mean` of as many draws."""
    scores = Side(mean, batch_size) if mean is not None else None
    return Side(votes(answer, draws), batch_size, slack=SLACK, draws=draws, scores=scores)


def side_of_engine(engine: Engine, batch_size: int, *, stochastic: bool) -> Side:
    """How the engine is judged: by its answer, or by the majority of its answers."""
    if not stochastic:
        return engine_side(engine, batch_size)
    return majority_side(engine.logits, batch_size, Mean(engine).logits)


def per_draw(side: Side, x: Images, worst: Images, y: NDArray[np.int64]) -> PerDraw:
    """How often a single draw is right, on the clean images and on the worst found for each: what one caller sees."""
    rows = np.arange(len(y))
    clean, robust = (float(np.nan_to_num(side.logits(images)[rows, y]).mean()) for images in (x, worst))
    return PerDraw(draws=side.draws, clean_accuracy=clean, robust_accuracy=robust)
