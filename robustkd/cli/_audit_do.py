"""What `robustkd audit` does: a whole audit, one shard of it, or an engine on a device with a kit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from robustkd.cli._audit_view import Told, Trust, option, show_shard
from robustkd.cli._print import say
from robustkd.errors import ConfigError

if TYPE_CHECKING:
    from robustkd.auditing.artifact import Subject
    from robustkd.result import AuditResult


def carry_out(
    artifact: str, order: dict[str, Any], bounds: dict[str, Any], *, kit: Path | None, trust: Trust, told: Told
) -> tuple[AuditResult, Path]:
    """The result and its folder; ends the program where a shard is finished and others are missing.

    Args:
        artifact: the command's argument.
        order: on what and how to attack; None where it was not asked for.
        bounds: what the verdict is held against, and where the audit is written.
        kit: the images to take instead of attacking.
        trust: what may run code when it is loaded.
        told: the forms of the result.
    """
    from robustkd.reporting.machines import place, tell

    summary_to = place(told.summary, told.junit)
    asked = {key: value for key, value in order.items() if value is not None}
    if kit is not None:
        result, folder = _on_device(artifact, kit, asked, bounds, trust)
    else:
        result, folder = _at_home(artifact, asked, bounds, trust, told)
    tell([result], junit_to=told.junit, summary_to=summary_to)
    return result, folder


def _on_device(
    artifact: str, kit: Path, asked: dict[str, Any], bounds: dict[str, Any], trust: Trust
) -> tuple[AuditResult, Path]:
    """No import here, or below, may need torch."""
    from robustkd.auditing.on_device import audit_kit

    bounds = {**bounds, "policy": asked.pop("policy", None)}
    if asked:
        names = ", ".join(map(option, asked))
        raise ConfigError(f"a kit settles this already: {names}", where="--kit", fix="leave it out, or audit without the kit")
    return audit_kit(artifact, kit, trust_engine=trust.engine, progress=say, **bounds)


def _at_home(
    artifact: str, asked: dict[str, Any], bounds: dict[str, Any], trust: Trust, told: Told
) -> tuple[AuditResult, Path]:
    if asked.get("no_merge") and "shard" not in asked:
        raise ConfigError("only a shard leaves merging to others", where="--no-merge", fix="leave it out, or add --shard I/N")
    if asked.get("jobs", 1) > 1:
        from robustkd.cli._audit_jobs import shards_at_once

        shards_at_once(artifact, asked, bounds, trust)
    from robustkd import api  # takes seconds, in which the shards have begun
    from robustkd.result import EXIT

    subject = _subject(artifact, asked, trust)
    options = {**{key: value for key, value in asked.items() if key != "jobs"}, **bounds, "progress": say}
    if "shard" not in options:
        found: tuple[AuditResult, Path] = api.audit(subject, **options)
        return found
    if "merge" in options:
        raise ConfigError("a shard merges nothing", where="--shard, --merge", fix="give one of the two")
    result, folder, absent = api.audit_shard(subject, **options)
    if result is None:
        show_shard(options["shard"], folder, absent, json=told.json)
        raise typer.Exit(EXIT["inconclusive"])
    return result, folder


def _subject(artifact: str, asked: dict[str, Any], trust: Trust) -> Subject | str:
    from robustkd import api
    from robustkd.cli._downloads import Downloads

    if artifact.startswith(api.TEACHER):
        with Downloads() as listen:
            name = artifact.removeprefix(api.TEACHER)
            return api.open_teacher(
                name, asked.get("data_root"), device=asked.get("device", "cpu"), trust_pickle=trust.pickle, listen=listen
            )
    if trust.engine:
        from robustkd.auditing.artifact import open_subject

        return open_subject(Path(artifact), trust=True, device=asked.get("device", "cpu"), runtime=asked.get("runtime"))
    return artifact
