"""What `robustkd audit` shows people: the table of attacks, the checks that are not ok, the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import typer

from robustkd.cli._print import console, emit

if TYPE_CHECKING:
    from robustkd.result import AuditResult, Interval, Side


class Trust(NamedTuple):
    """What may run code when it is loaded."""

    engine: bool
    pickle: bool


class Told(NamedTuple):
    """In which forms the result is told."""

    json: bool
    junit: Path | None
    summary: Path | None


def option(key: str) -> str:
    """An option's name as it is typed, from that of its value."""
    return "--" + key.replace("_root", "").replace("_", "-")


Accuracy = Literal["clean_accuracy", "robust_accuracy", "robust_accuracy_float", "robust_accuracy_uint8"]


def show(result: AuditResult, folder: Path) -> None:
    """The table of attacks, the checks that are not ok, and the verdict, on stdout."""
    from rich.table import Table

    out = console()
    threat, data = result.threat, result.dataset
    out.print(f"{result.artifact.path} ({result.artifact.runtime}, {result.artifact.precision})", markup=False)
    out.print(
        f"{data.n} images of {data.name}, {threat.norm} eps {threat.eps:.5f}, policy {result.policy['name']}", markup=False
    )
    table = Table("attack", "level", "images", "broken", "engine left", *(["source left"] if result.source_model else []))
    table.add_row("clean", "", str(data.n), "", *_both(result, "clean_accuracy"))
    for name, attack in result.engine.attacks.items():
        row = [name, attack.level, str(attack.images), str(attack.broken), f"{attack.robust_accuracy:.1%}"]
        if result.source_model:
            row.append(f"{result.source_model.attacks[name].robust_accuracy:.1%}")
        table.add_row(*row)
    if result.engine.robust_accuracy_uint8 is not None:
        table.add_row("float images", "", "", "", *_both(result, "robust_accuracy_float"))
        table.add_row("8-bit images", "", "", "", *_both(result, "robust_accuracy_uint8"))
    if (one := result.engine.per_draw) is not None:
        blank = [""] if result.source_model else []
        table.add_row("clean, one draw", "", "", "", f"{one.clean_accuracy:.1%}", *blank)
        table.add_row("attacked, one draw", "", "", "", f"{one.robust_accuracy:.1%}", *blank)
    table.add_row("worst case", "", str(data.n), "", *_both(result, "robust_accuracy"), style="bold")
    out.print(table)
    for check in result.checks:
        if check.status in ("warn", "block", "skipped"):
            out.print(f"{check.status}: {check.name}: {check.message}", markup=False)
    out.print(f"verdict: {result.verdict.status}", style="bold", markup=False)
    for reason in result.verdict.reasons:
        out.print(f"  {reason}", markup=False)
    out.print(f"written to {folder}", markup=False)


def _both(result: AuditResult, field: Accuracy) -> list[str]:
    def shown(side: Side) -> str:
        seen: Interval | None = getattr(side, field)
        if seen is None:
            return ""
        return f"{seen.estimate:.1%} ({seen.low:.1%} to {seen.high:.1%})"

    return [shown(side) for side in (result.engine, result.source_model) if side is not None]


def show_shard(shard: str, place: Path, absent: tuple[str, ...], *, json: bool) -> None:
    """A shard has no verdict: where it is, and what is missing for one."""
    told: dict[str, Any] = {"schema": "robustkd.audit-shard/1", "shard": shard, "path": str(place), "missing": list(absent)}
    if json:
        emit(told)
        return
    typer.echo(f"shard {shard} is finished: {place}")
    if absent:
        typer.echo(f"no verdict yet: {', '.join(absent)} missing; the last one to finish merges, or name them with --merge")
    else:
        typer.echo("no verdict yet: all shards are finished; the same command without --shard merges them")
