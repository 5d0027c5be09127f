"""What the engine answered, image by image: the part of records.parquet that a page of pictures needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustkd.errors import ArtifactError

#: column of records.parquet per field below
COLUMNS = {"index": "index", "clean": "clean_prediction", "adversarial": "adversarial_prediction", "robust": "robust"}
#: columns that an audit without a source, or another version, may lack
EXTRA = {"label": "label", "source_robust": "source:robust"}


@dataclass(frozen=True)
class Answer:
    """The engine's class for one image, clean and attacked, and whether every attack failed on it, and on the source."""

    clean: int
    adversarial: int
    robust: bool
    label: int | None = None
    source_robust: bool | None = None


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
        extra = {field: name for field, name in EXTRA.items() if name in present}
        columns = pq.read_table(file, columns=[*COLUMNS.values(), *extra.values()]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError("records.parquet cannot be read", where=str(file), fix=str(error)) from error
    blank = [None] * len(columns["index"])
    fields = (columns[name] for name in COLUMNS.values())
    more = (columns[extra[field]] if field in extra else blank for field in EXTRA)
    return {
        int(index): Answer(int(clean), int(adversarial), bool(robust), label, held)
        for index, clean, adversarial, robust, label, held in zip(*fields, *more, strict=True)
    }
