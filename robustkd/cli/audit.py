"""`robustkd audit`: attack an exported file itself and give a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from robustkd.cli._print import Json, console, emit, say
from robustkd.cli.distill import TrustPickle

if TYPE_CHECKING:
    from robustkd.auditing.artifact import Subject
    from robustkd.result import AuditResult, Interval, Side


def audit(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A bundle folder, a bare .onnx file, or teacher:NAME.")],
    source: Annotated[
        Path | None, typer.Option("--source", help="Checkpoint to hold it against; left out, the bundle's parent.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="D", help="Data set name, folder or .npz; left out, the bundle's.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data root; left out, ROBUSTKD_DATA, then ./data.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many test images.")] = None,
    eps: Annotated[str | None, typer.Option("--eps", help="Radius: 8/255 or a decimal; left out, the bundle's.")] = None,
    norm: Annotated[Literal["linf", "l2"] | None, typer.Option("--norm", help="Norm; left out, the bundle's.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", help="quick, standard, full, or a YAML file.")] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", metavar="PP", min=0, max=100, help="Allowed drop in percentage points.")
    ] = None,
    min_robust: Annotated[
        float | None, typer.Option("--min-robust", metavar="P", min=0, max=100, help="Floor of robust accuracy, percent.")
    ] = None,
    min_clean: Annotated[
        float | None, typer.Option("--min-clean", metavar="P", min=0, max=100, help="Floor of clean accuracy, percent.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of images and of all attacks.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted audit.")] = False,
    trust_pickle: TrustPickle = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The audit's folder; left out, `audit` inside the bundle.")
    ] = None,
    json: Json = False,
) -> None:
    """Attack an exported file itself and give a verdict.

    Exit code: 0 pass, 10 fail, 11 inconclusive, 12 invalid (a sanity check blocks).
    """
    from robustkd import api
    from robustkd.cli._downloads import Downloads
    from robustkd.result import EXIT

    subject: Subject | str = artifact
    if artifact.startswith(api.TEACHER):
        with Downloads() as told:
            name = artifact.removeprefix(api.TEACHER)
            subject = api.open_teacher(name, data, trust_pickle=trust_pickle, listen=told)
    result, folder = api.audit(
        subject,
        source=source,
        dataset=dataset,
        data_root=data,
        n=n,
        eps=eps,
        norm=norm,
        policy=policy,
        tolerance=tolerance,
        min_robust=min_robust,
        min_clean=min_clean,
        seed=seed,
        resume=resume,
        output=output,
        progress=say,
    )
    if json:
        emit(result.model_dump(mode="json", by_alias=True))
    else:
        show(result, folder)
    raise typer.Exit(EXIT[result.verdict.status])


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
    table.add_row("worst case", "", str(data.n), "", *_both(result, "robust_accuracy"), style="bold")
    out.print(table)
    for check in result.checks:
        if check.status in ("warn", "block", "skipped"):
            out.print(f"{check.status}: {check.name}: {check.message}", markup=False)
    out.print(f"verdict: {result.verdict.status}", style="bold", markup=False)
    for reason in result.verdict.reasons:
        out.print(f"  {reason}", markup=False)
    out.print(f"written to {folder}", markup=False)


def _both(result: AuditResult, field: Literal["clean_accuracy", "robust_accuracy"]) -> list[str]:
    def shown(side: Side) -> str:
        seen: Interval = getattr(side, field)
        return f"{seen.estimate:.1%} ({seen.low:.1%} to {seen.high:.1%})"

    return [shown(side) for side in (result.engine, result.source_model) if side is not None]
