"""What every attack did to every image on both sides."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from robustkd.auditing.sides import NOT_TRIED, Judged
from robustkd.engines._base import Images
from robustkd.threat import SLACK, ThreatModel

Flags = NDArray[np.bool_]


@dataclass
class Track:
    """One side: its clean answers, and for each attack its answers; a margin of NaN is an image not tried."""

    clean: Judged
    attacks: dict[str, Judged] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """Open the record of an attack."""
        n = len(self.clean.margin)
        self.attacks[name] = Judged(np.full(n, NOT_TRIED, np.int64), np.full(n, np.nan))

    def add(self, name: str, index: NDArray[np.int64], judged: Judged) -> None:
        """Enter the answers to the images of an index array."""
        self.attacks[name].prediction[index] = judged.prediction
        self.attacks[name].margin[index] = judged.margin

    def tried(self, name: str) -> Flags:
        """Images the attack was tried on."""
        flags: Flags = ~np.isnan(self.attacks[name].margin)
        return flags

    def first(self, n: int) -> Flags:
        """The first n images that are right when clean, by their position in the audit; for 0 all of these."""
        right = self.clean.robust
        return right & (np.cumsum(right) <= n) if n else right

    def broken(self, names: Iterable[str]) -> Flags:
        """Images that one of these attacks broke."""
        flags = np.zeros(len(self.clean.margin), np.bool_)
        for name in names:
            flags |= self.tried(name) & ~self.attacks[name].robust
        return flags

    def robust(self) -> Flags:
        """Right on the clean image and on every image tried."""
        flags: Flags = self.clean.robust & ~self.broken(self.attacks)
        return flags


class Ledger:
    """Both tracks, and for each image the adversarial image that came closest to (or furthest beyond) a break.

    Args:
        x: clean images (n, C, H, W).
        threat: the ball every image is checked against.
        engine: clean answers of the artifact; source: those of the source, or None.
    """

    def __init__(self, x: Images, threat: ThreatModel, engine: Judged, source: Judged | None) -> None:
        self.engine = Track(engine)
        self.source = Track(source) if source is not None else None
        self.worst, self.worst_margin = x.copy(), engine.margin.copy()
        self.worst_attack: list[str] = [""] * len(x)
        self.outside, self.furthest = 0, 0.0
        self._x, self._threat = x, threat

    def begin(self, name: str) -> None:
        """Open the record of an attack on both sides."""
        self.engine.begin(name)
        if self.source is not None:
            self.source.begin(name)

    def add(self, name: str, index: NDArray[np.int64], x_adv: Images, engine: Judged, source: Judged | None) -> None:
        """Enter one chunk: its images as judged on both sides."""
        self.engine.add(name, index, engine)
        if self.source is not None and source is not None:
            self.source.add(name, index, source)
        self._inside(x_adv, index)
        for i, image, margin in zip(index.tolist(), x_adv, engine.margin, strict=True):
            # an image wrong when clean stays as it is: nothing was needed to break it
            if self.engine.clean.robust[i] and (margin < self.worst_margin[i] or not self.worst_attack[i]):
                self.worst[i], self.worst_margin[i], self.worst_attack[i] = image, margin, name

    def _inside(self, x_adv: Images, index: NDArray[np.int64]) -> None:
        found = distances(x_adv, self._x[index], self._threat.norm)
        legal = np.isfinite(x_adv).all(axis=(1, 2, 3)) & (x_adv >= 0).all(axis=(1, 2, 3)) & (x_adv <= 1).all(axis=(1, 2, 3))
        self.outside += int((~(legal & (found <= self._threat.eps + SLACK))).sum())
        self.furthest = max(self.furthest, float(found.max(initial=0.0)))


def distances(x_adv: Images, x: Images, norm: str) -> NDArray[np.float64]:
    """The linf or l2 distance of each image from its original, in float64."""
    delta = (x_adv.astype(np.float64) - x.astype(np.float64)).reshape(len(x), math.prod(x.shape[1:]))
    if norm == "linf":
        furthest: NDArray[np.float64] = np.abs(delta).max(axis=1, initial=0.0)
        return furthest
    length: NDArray[np.float64] = np.sqrt((delta * delta).sum(axis=1))
    return length
