"""The verbs of an audit: from a path and options to a finished audit bundle, or to one shard of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustkd.auditing.artifact import Runtime, Subject
from robustkd.auditing.asking import Ask, ask
from robustkd.auditing.kit import save_kit as write_kit
from robustkd.auditing.latency import with_speed
from robustkd.auditing.merge import begun, complete, finished, forget, missing, shard_folder, write_shard
from robustkd.auditing.run import carry_out, carry_out_shard
from robustkd.auditing.shards import Shard
from robustkd.auditing.store import IDENTITY, locked, same_audit
from robustkd.auditing.write import write_audit
from robustkd.bundle import MANIFEST
from robustkd.engines.pytorch import full_products
from robustkd.errors import ArtifactError, ConfigError
from robustkd.result import AuditResult
from robustkd.signals import graceful


def audit(
    artifact: Path | str | Subject,
    *,
    source: Path | str | None = None,
    dataset: str | None = None,
    data_root: Path | str | None = None,
    n: int | None = None,
    eps: float | str | None = None,
    norm: str | None = None,
    policy: str | None = None,
    tolerance: float | None = None,
    min_robust: float | None = None,
    min_clean: float | None = None,
    stochastic: bool | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    runtime: Runtime | None = None,
    seed: int = 0,
    resume: bool = False,
    merge: Sequence[Path | str] = (),
    save_kit: Path | str | None = None,
    output: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[AuditResult, Path]:
    """Attack an artifact itself and say whether it is good enough.

    Args:
        artifact: a bundle folder (checkpoint or onnx), a bare .onnx file, or what is open already;
            `robustkd.audit` also takes `teacher:NAME`.
        source: the checkpoint to hold it against, or `none`; left out, the parent of the bundle where it is found.
        dataset: a name on the shelf, a folder or an .npz; left out, that of the bundle's recipe.
        data_root: where the data sets are.
        n: test images, the first n in an order set by `seed`.
        eps: radius on the [0, 1] scale, or "8/255"; left out, that of the bundle.
        norm: `linf` or `l2`.
        policy: `quick`, `standard`, `full`, or a path to a YAML file.
        tolerance: allowed drop against the source, in percentage points.
        min_robust: floor of robust accuracy in percent.
        min_clean: floor of clean accuracy in percent.
        stochastic: the engine is random on purpose; it is judged by the majority of several draws.
        batch_size: images at a time; part of what is audited, for another one rounds differently.
        device: where the networks that are attacked run: `cpu`, `cuda`, or `auto`, a GPU where there is one. TF32 is off.
        runtime: of an .onnx file: `onnxruntime`, or `onnx-torch`, which runs the same graph on the device.
        seed: of the choice of images and of all attacks.
        resume: continue an interrupted audit; a finished one of the same kind is returned as it is.
        merge: finished shards of this audit (see `audit_shard`), which are all that is missing of it.
        save_kit: a file to write for `audit_kit`: every image made, so that a device without torch can answer them.
        output: the audit's folder; left out, `audit` inside the bundle, `<stem>-audit` beside a bare file, or
            `teacher-NAME/audit` in the runs folder.
        progress: called with one line per finished chunk and per warning.

    Returns:
        The result and the folder of the audit bundle.

    Raises:
        ArtifactError: a file is missing, damaged, foreign, or the output is taken.
        ConfigError: the policy or a value is wrong, or a bare file came without data set or eps.
        NumericsError: source and engine do not agree at all.
        RequirementError: a package is missing.
    """
    asked = ask(
        artifact,
        source=source,
        dataset=dataset,
        data_root=data_root,
        n=n,
        eps=eps,
        norm=norm,
        policy=policy,
        tolerance=tolerance,
        min_robust=min_robust,
        min_clean=min_clean,
        stochastic=stochastic,
        batch_size=batch_size,
        device=device,
        runtime=runtime,
        seed=seed,
        resume=resume,
        save_kit=save_kit,
        output=output,
        progress=progress,
    )
    with graceful(), full_products(), locked(asked.folder):
        if (found := asked.found()) is not None:
            return found, asked.folder
        return _whole(asked, [Path(folder) for folder in merge]), asked.folder


def audit_shard(
    artifact: Path | str | Subject, shard: str, *, no_merge: bool = False, **options: Any
) -> tuple[AuditResult | None, Path, tuple[str, ...]]:
    """Do one shard of an audit; the last one to finish merges them all.

    Args:
        artifact: as in `audit`.
        shard: "I/N", counted from 1: every N-th chunk of the images.
        no_merge: leave that to another call; `audit` merges the shards it finds.
        options: the options of `audit` but `merge`; they must be the same for every shard.

    Returns:
        The result of the whole audit, or None; where it is written; the shards that are missing beside it.

    Raises:
        ArtifactError: as in `audit`; or the shards beside this one are of another audit.
        ConfigError: as in `audit`; or there is no such shard.
    """
    part, asked = Shard.parse(shard), ask(artifact, **options)
    if asked.config.stochastic:
        raise ConfigError(
            "an engine that is random gives every shard other clean answers", where="--shard", fix="audit it in one piece"
        )
    home = shard_folder(asked.folder, part)
    with graceful(), full_products():
        with locked(home):
            if (found := asked.found()) is not None:
                return found, asked.folder, ()
            _part(asked, part, home)
        with locked(asked.folder, wait=True):  # two shards may finish at once: one merges, the other reads
            if (found := replace(asked, resume=True).found()) is not None:
                return found, asked.folder, ()
            absent = missing(s for s in finished([asked.folder]) if s.total == part.total)
            if absent or no_merge:
                return None, home, tuple(map(str, absent))
            return _whole(asked, ()), asked.folder, ()


def _part(asked: Ask, shard: Shard, home: Path) -> None:
    """The bundle of one shard; one that is there already is checked, if resuming is asked for."""
    done = (home / MANIFEST).is_file()
    if done and not asked.resume:
        raise ArtifactError("this shard is finished already", where=str(home), fix="run the others, or --resume to merge")
    with asked.order(home, resume=asked.resume and not done) as order:
        beside = finished([asked.folder]) if begun(asked.folder) else {}
        for other in beside.values():
            same_audit(other / IDENTITY, json.loads(json.dumps(order.identity())))
        if not done:
            write_shard(carry_out_shard(order, shard), asked.folder, shard, asked.subject.bundle)


def _whole(asked: Ask, merge: Sequence[Path]) -> AuditResult:
    """Carry out the audit, from shards where there are some, and write it."""
    own = [asked.folder] if begun(asked.folder) else []
    shards = complete(finished([*merge, *own])) if merge or own else ()
    with asked.order(asked.folder, resume=asked.resume or bool(shards), shards=shards) as order:
        result, arrays = carry_out(order)
        result = with_speed(result, order.engine, arrays.x, stochastic=asked.config.stochastic)
    if asked.save_kit is not None:
        told = asked.subject.bundle.manifest.model if asked.subject.bundle else None
        asked.say(f"kit {asked.save_kit}: {write_kit(asked.save_kit, result, arrays, told)}")
    write_audit(result, arrays, asked.folder, asked.subject.bundle)
    forget(asked.folder)
    return result
