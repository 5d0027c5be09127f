"""The verb for a device: an engine answers the images of a kit. Needs the light core and the runtime, no torch.

The images were made without access to this engine, so what they cannot show is said: on an engine that computes
another function than the source (quantised, as a rule), replayed images refute robustness and never prove it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from robustkd.auditing import probes, recheck
from robustkd.auditing.artifact import Subject, open_subject
from robustkd.auditing.facts import AuditArrays
from robustkd.auditing.kit import Kit, read_kit
from robustkd.auditing.latency import latency_bounds, with_speed
from robustkd.auditing.ledger import Ledger
from robustkd.auditing.sides import NO_NUMBER, Side, engine_side
from robustkd.auditing.store import Store, locked
from robustkd.auditing.summary import counts_of, side_of, yielded
from robustkd.auditing.verdict import difference, judge
from robustkd.auditing.write import write_audit
from robustkd.bundle import MANIFEST, sha256
from robustkd.engines._base import Engine
from robustkd.errors import ArtifactError, ConfigError
from robustkd.recipe.policy import AuditConfig, Gates, bounds_told, gates_of, read_policy
from robustkd.result import Artifact, AttackResult, AuditResult, Check, KitUsed, Level
from robustkd.signals import graceful

#: precisions whose arithmetic is that of the source up to rounding
PLAIN = ("fp32", "tf32", "fp16", "bf16")
#: largest change of a margin, in units of the spread of the logits, up to which an engine computes the source's function
SAME = 0.05
_WEAK = (
    "the images of the kit were made without access to this engine; on one that answers otherwise than its source they can "
    "refute robustness, not show it: audit it with its source, where gradients can be had"
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Seen:
    """What the engine answered to the kit."""

    side: Side
    ledger: Ledger
    engine: dict[str, AttackResult]
    source: dict[str, AttackResult]


def audit_kit(
    artifact: Path | str,
    kit: Path,
    *,
    policy: str | None = None,
    tolerance: float | None = None,
    min_robust: float | None = None,
    min_clean: float | None = None,
    output: Path | None = None,
    trust_engine: bool = False,
    progress: Say | None = None,
) -> tuple[AuditResult, Path]:
    """Audit an engine with the images of a kit that `robustkd audit --save-kit` wrote.

    Args:
        artifact: a bundle folder or a bare file.
        kit: the kit.
        policy: a policy whose gates replace those of the audit that made the kit; what it attacks has no meaning here.
        tolerance: allowed drop in percentage points; left out, that of the audit which made the kit, as are the floors.
        min_robust: floor of robust accuracy in percent.
        min_clean: floor of clean accuracy in percent.
        output: the audit's folder; left out, as for any audit.
        trust_engine: load a TensorRT engine that no manifest vouches for.
        progress: called with one line per attack.

    Raises:
        ArtifactError: a file is missing, damaged or foreign, or the output is taken.
        ConfigError: a bound is out of range.
        NumericsError: the engine does not agree with the source at all.
        RequirementError: the runtime is missing.
    """
    say = progress or (lambda line: None)
    held = read_kit(kit)
    config = _config(held, {"tolerance": tolerance, "min_robust": min_robust, "min_clean": min_clean})
    gates = gates_of(read_policy(policy).gates if policy else _gates(held, kit), config)
    subject = open_subject(Path(artifact), trust=trust_engine)
    folder = output or subject.home
    with graceful(), locked(folder):
        if (folder / MANIFEST).is_file() or (folder.exists() and any(folder.iterdir())):
            raise ArtifactError("there is something here already", where=str(folder), fix="choose another --output")
        channels, height, width = held.x.shape[1:]
        with subject.engine((channels, height, width)) as engine:
            _fits(engine, held, kit)
            seen = _ask(engine, held, config, say)
            result = _result(engine, held, config, gates, seen, subject, kit)
            result = with_speed(result, engine, held.x, stochastic=config.stochastic)
        arrays = AuditArrays(held.x, held.y, held.index, seen.ledger, Store(None, {}))
        write_audit(result, arrays, folder, subject.bundle)
    return result, folder


def _config(kit: Kit, options: dict[str, Any]) -> AuditConfig:
    given = {key: value for key, value in options.items() if value is not None}
    batch = (kit.told.policy.get("bounds") or {}).get("batch_size", AuditConfig().batch_size)
    try:
        return AuditConfig.model_validate({"batch_size": batch, **given})
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{first['loc'][0]}: {first['msg']}"
        raise ConfigError(what, where="audit options", fix="see `robustkd audit --help`") from None


def _gates(kit: Kit, file: Path) -> Gates:
    """The gates of the audit that made the kit."""
    try:
        return Gates.model_validate((kit.told.policy.get("bounds") or {}).get("gates", {}))
    except ValidationError as error:
        raise ArtifactError("the kit holds bounds of another version", where=str(file), fix="save it anew") from error


def _fits(engine: Engine, kit: Kit, file: Path) -> None:
    shape, classes = tuple(engine.info.input_shape), engine.info.classes
    if shape != kit.x.shape[1:] or int(kit.y.max()) >= classes:
        raise ArtifactError(
            f"the engine takes {shape} and knows {classes} classes; the kit holds images {kit.x.shape[1:]} "
            f"with labels up to {int(kit.y.max())}",
            where=str(file),
            fix="take the kit of an audit of this model",
        )


def _ask(engine: Engine, kit: Kit, config: AuditConfig, say: Say) -> _Seen:
    """Judge every image of the kit, attack by attack."""
    side = engine_side(engine, config.batch_size)
    ledger = Ledger(kit.x, kit.told.threat, side.judge(kit.x, kit.y), kit.source)
    results: tuple[dict[str, AttackResult], dict[str, AttackResult]] = ({}, {})
    for pool in kit.pools:
        name, before = pool.made.name, side.images
        ledger.begin(name)
        ledger.add(name, pool.index, pool.x_adv, side.judge(pool.x_adv, kit.y[pool.index]), pool.source)
        level: Level = "baseline" if pool.made.level == "baseline" else "replay"
        results[0][name] = yielded(ledger.engine, name, level, side.images - before, 0.0)
        if ledger.source is not None:
            results[1][name] = yielded(ledger.source, name, level, 0, 0.0)
        say(f"{name}: {len(pool.index)} images, robust so far {100 * float(ledger.engine.robust().mean()):.1f} %")
    return _Seen(side, ledger, *results)


def _result(
    engine: Engine, kit: Kit, config: AuditConfig, gates: Gates, seen: _Seen, subject: Subject, file: Path
) -> AuditResult:
    told, ledger = kit.told, seen.ledger
    logits = seen.side.logits(kit.x)
    same = _same_function(kit, ledger, probes.spread(logits), engine.info.precision)
    checks = [*_checks(kit, seen, logits, config, gates), same]
    counts = counts_of(ledger, white_box=same.status == "ok", why=_WEAK)
    all_checks, verdict = judge(counts, gates, checks, latency_bounds(engine, kit.x, gates))
    fields = {"runtime", "runtime_version", "precision", "device", "settings"}
    return AuditResult(
        artifact=Artifact(path=subject.facts.path, sha256=subject.facts.sha256, **engine.info.model_dump(include=fields)),
        source=told.source,
        threat=told.threat,
        dataset=told.dataset,
        policy={**told.policy, "bounds": bounds_told(gates, config)},
        seed=told.seed,
        seconds=0.0,
        engine=side_of(ledger.engine, seen.engine),
        source_model=side_of(ledger.source, seen.source) if ledger.source else None,
        difference=difference(counts),
        checks=all_checks,
        verdict=verdict,
        kit=KitUsed(path=str(file), sha256=sha256(file), made_on=told.artifact),
    )


def _checks(kit: Kit, seen: _Seen, logits: Any, config: AuditConfig, gates: Gates) -> list[Check]:
    side, ledger, clean, threat = seen.side, seen.ledger, seen.ledger.engine.clean, kit.told.threat
    attacked = sum(int((a.prediction == NO_NUMBER).sum()) for a in ledger.engine.attacks.values())
    found = [probes.deterministic(side, kit.x, kit.y, logits), probes.batch_independent(side, kit.x, kit.y)]
    found.append(probes.finite(clean, probes.extremes(side, kit.x, threat), attacked))
    found.append(probes.output(logits, clean, probes.output_kind(logits)))
    if kit.source is not None:
        found.append(probes.agreement(clean, kit.source, (gates.clean_drop or 0.0) / 100, paired=True))
    found.append(probes.grey(side, kit.x, kit.y))
    found.append(recheck.inside(ledger, threat))
    found.append(recheck.rejudged(side, ledger, kit.x, kit.y, config.batch_size))
    return found


def _same_function(kit: Kit, ledger: Ledger, unit: float, precision: str) -> Check:
    """Whether the engine answers all images as the source does: then attacks on the source are white-box on it too."""
    name = "kit: same function as the source"
    pairs = [(ledger.engine.attacks[p.made.name].margin[p.index], p.source.margin) for p in kit.pools if p.source]
    white_box = any(p.made.level in ("replay", "surrogate") and len(p.index) for p in kit.pools)
    if kit.source is None or not white_box:
        return Check(name=name, status="skipped", message="the kit holds no images that were made with gradients of a source")
    pairs.append((ledger.engine.clean.margin, kit.source.margin))
    gaps = np.concatenate([np.abs(mine - theirs) for mine, theirs in pairs])
    furthest = float(gaps.max()) / unit if np.isfinite(gaps).all() else float("inf")
    plain = precision in PLAIN
    text = f"margins differ from the source's by up to {100 * furthest:.2g} % of the spread of the logits"
    if not plain:
        text += f", and the engine is {precision}"
    elif furthest <= SAME:
        text += "; what was white-box on the source is so on this engine"
    observed = furthest if np.isfinite(furthest) else None
    return Check(name=name, status="ok" if plain and furthest <= SAME else "warn", observed=observed, bound=SAME, message=text)
