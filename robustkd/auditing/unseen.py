"""Images that an audit does not attack, for the control of memorised test images (S16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robustkd.auditing.controls import Unseen
from robustkd.datasets._base import ImageSet
from robustkd.datasets._open import open_dataset
from robustkd.errors import ArtifactError

#: images of the control
LIMIT = 256


def unseen_images(spec: str | dict[str, Any], root: Path | None, shown: ImageSet, seed: int) -> Unseen | None:
    """Some images of the training part that are none of those shown, else of the rest of the test part, or None.

    Pictures are read one by one, so that a large training folder is not read whole. A model is no worse on images that
    it was trained on; one that has stored its test set is.
    """
    config = open_dataset(spec, root).model_copy(update={"stream": "always"})
    known = {_bytes(image) for image in np.asarray(shown.images)}
    for split in ("train", "test"):
        try:
            part = config.load(split)
        except ArtifactError:
            continue  # this part is missing; the test part was read already
        if part.shape != shown.shape:
            continue
        order = np.random.default_rng(seed).permutation(len(part))[: LIMIT + len(shown)]
        found = _others(part, order, known, len(shown.classes))
        if found is not None:
            return found
    return None


def _others(part: ImageSet, order: Any, known: set[bytes], classes: int) -> Unseen | None:
    chosen: list[int] = []
    for first in range(0, len(order), LIMIT):
        rows = part.take(order[first : first + LIMIT])
        fresh = [_bytes(image) not in known for image in np.asarray(rows.images)]
        chosen += order[first : first + LIMIT][np.asarray(fresh) & (rows.labels < classes)].tolist()
        if len(chosen) >= LIMIT:
            break
    if not chosen:
        return None
    rows = part.take(np.asarray(chosen[:LIMIT], np.int64))
    return Unseen(rows.floats(), rows.labels)


def _bytes(image: Any) -> bytes:
    return np.ascontiguousarray(image).tobytes()
