"""What is known of the teachers: a line for each, or one card with where its weights are. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robustkd.cli._stock import card, cards


def teacher_rows() -> list[dict[str, Any]]:
    """Every card: its data, threat model and figures (fractions), and the path of its weights where they are here."""
    return [_row(name) for name in cards()]


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The same for people: percent, and under attack by AutoAttack, or by PGD-10 where that is what is known."""
    return [_cells(row) for row in rows]


def teacher_text(name: str) -> str:
    """One card as it is, and below it where its weights are or should be.

    Raises:
        ConfigError: no teacher has this name.
    """
    import yaml

    content = card(name)
    text = str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True)).rstrip()
    return "\n".join([text, *(f"# {line}" for line in _whereabouts(content))])


def _whereabouts(content: dict[str, Any]) -> Iterator[str]:
    from robustkd.training.places import folders

    if (file := _weights(content)) is not None:
        yield f"weights: {file}"
        return
    yield f"weights: not here; looked for {content['file']} in {' and '.join(str(folder) for folder in folders(None))}"
    if content.get("source"):
        yield f"they are fetched from {content['source']} when they are needed"


def _row(name: str) -> dict[str, Any]:
    content = card(name)
    figures = _figures(content)
    return {
        "name": name,
        "summary": str(content.get("summary", "")),
        "dataset": content.get("dataset"),
        "threat": content.get("threat"),
        "clean": figures.get("clean"),
        "autoattack": figures.get("autoattack"),
        "pgd10": figures.get("pgd10"),
        "weights": None if (file := _weights(content)) is None else str(file),
    }


def _figures(content: dict[str, Any]) -> dict[str, Any]:
    measured = content.get("measured") or {}
    inner = next((value for value in measured.values() if isinstance(value, dict)), {})
    return {**measured, **inner, **(content.get("reported") or {})}


def _weights(content: dict[str, Any]) -> Path | None:
    import robustkd
    from robustkd.training.places import here

    return here(content["file"], None, shipped=Path(robustkd.__file__).parent / "teachers")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    robust = next((f"{row[key]:.1%} {title}" for key, title in (("autoattack", "AA"), ("pgd10", "PGD")) if row[key]), "-")
    clean = f"{row['clean']:.1%} clean" if row["clean"] is not None else "-"
    return row["name"], row["dataset"], clean, robust, "here" if row["weights"] else "not here", row["summary"]
