"""What the engine answered, image by image: the part of records.parquet that a page of pictures needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustkd.errors import ArtifactError

#: column of records.parquet per field below
COLUMNS = {"index": "index", "clean": "clean_prediction", "adversarial": "adversarial_prediction", "robust": "robust"}


@dataclass(frozen=True)
class Answer:
    """The engine's class for one image, clean and attacked, and whether every attack failed on it."""

    clean: int
    adversarial: int
    robust: bool


Predictions = dict[int, Answer]
"""Answers by the index of the image in its data set."""


def read_predictions(file: Path) -> Predictions | None:
    """The answers of one audit; nothing where the file is missing or holds no such columns.

    Raises:
        ArtifactError: the file is damaged.
    """
    if not file.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        present = set(pq.read_schema(file).names)
        if not set(COLUMNS.values()) <= present:
            return None
        columns = pq.read_table(file, columns=list(COLUMNS.values())).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError("records.parquet cannot be read", where=str(file), fix=str(error)) from error
    rows = zip(*(columns[name] for name in COLUMNS.values()), strict=True)
    return {int(index): Answer(int(clean), int(adversarial), bool(robust)) for index, clean, adversarial, robust in rows}
