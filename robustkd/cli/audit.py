"""`robustkd audit`: attack an exported file itself and give a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from robustkd.cli._audit_view import Told, Trust, show
from robustkd.cli._print import Json, emit
from robustkd.cli.distill import TrustPickle


def audit(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="A bundle folder, a bare .onnx or .engine file, or teacher:NAME.")
    ],
    source: Annotated[
        Path | None, typer.Option("--source", help="Checkpoint to hold it against, or none; left out, the bundle's parent.")
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
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="The engine is random on purpose: judge the majority of 16 draws.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", min=1, help="Images at a time.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where networks are attacked: cpu, cuda, or auto, a GPU where there is one.")
    ] = "cpu",
    runtime: Annotated[
        Literal["onnxruntime", "onnx-torch"] | None,
        typer.Option("--runtime", help="Of an .onnx file; onnx-torch runs its graph on --device. Left out, onnxruntime."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of images and of all attacks.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted audit.")] = False,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Attack one of N slices; the last to finish merges.")
    ] = None,
    no_merge: Annotated[
        bool, typer.Option("--no-merge", help="With --shard: leave the merging to another call, also as the last.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="All shards here at once, in N processes, then merged.")
    ] = None,
    save_kit: Annotated[
        Path | None, typer.Option("--save-kit", metavar="FILE.npz", help="Also write a kit for an audit on a device.")
    ] = None,
    kit: Annotated[
        Path | None, typer.Option("--kit", metavar="FILE.npz", help="Audit with a kit: needs the runtime and no torch.")
    ] = None,
    merge: Annotated[
        list[Path] | None, typer.Option("--merge", metavar="DIR", help="Finished shards from elsewhere; may be repeated.")
    ] = None,
    trust_pickle: TrustPickle = False,
    trust_engine: Annotated[
        bool, typer.Option("--trust-engine", help="Load a TensorRT engine that no manifest vouches for; it can hold code.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The audit's folder; left out, `audit` inside the bundle.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE.xml", help="Also write JUnit XML.")] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE.md", help="Append Markdown here; `github`: to the job's summary.")
    ] = None,
    json: Json = False,
) -> None:
    """Attack an exported file itself and give a verdict.

    Exit code: 0 pass, 10 fail, 11 inconclusive (as is a shard whose siblings are missing), 12 invalid (a check blocks).
    """
    from robustkd.cli._audit_do import carry_out
    from robustkd.result import EXIT

    result, folder = carry_out(
        artifact,
        {
            "source": source,
            "dataset": dataset,
            "data_root": data,
            "n": n,
            "eps": eps,
            "norm": norm,
            "policy": policy,
            "stochastic": stochastic or None,
            "batch_size": batch_size,
            "device": device if device != "cpu" else None,
            "runtime": runtime,
            "seed": seed or None,
            "resume": resume or None,
            "save_kit": save_kit,
            "merge": merge or None,
            "shard": shard,
            "no_merge": no_merge or None,
            "jobs": jobs,
        },
        {"tolerance": tolerance, "min_robust": min_robust, "min_clean": min_clean, "output": output},
        kit=kit,
        trust=Trust(engine=trust_engine, pickle=trust_pickle),
        told=Told(json=json, junit=junit, summary=summary),
    )
    if json:
        emit(result.model_dump(mode="json", by_alias=True))
    else:
        show(result, folder)
    raise typer.Exit(EXIT[result.verdict.status])
