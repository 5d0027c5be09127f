"""Audits side by side, and whether they may be compared at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkd.reporting import numbers
from robustkd.result import AuditResult


def compare(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """One row per audit: artifact, precision, accuracies with intervals, drop against the source, verdict. Fractions."""
    return [_row(result) for result in results]


def _row(result: AuditResult) -> dict[str, Any]:
    return {
        "artifact": result.artifact.path,
        "sha256": result.artifact.sha256,
        "runtime": result.artifact.runtime,
        "precision": result.artifact.precision,
        "dataset": result.dataset.name,
        "n": result.dataset.n,
        "threat": {"norm": result.threat.norm, "eps": result.threat.eps},
        "policy": result.policy.get("name"),
        "clean_accuracy": result.engine.clean_accuracy.model_dump(),
        "robust_accuracy": result.engine.robust_accuracy.model_dump(),
        "drop": result.difference.robust.model_dump() if result.difference else None,
        "verdict": result.verdict.status,
    }


def mismatches(results: Sequence[AuditResult]) -> list[str]:
    """Sentences on what was not alike between the audits; empty where their figures compare."""
    seen = {
        "images": [f"{r.dataset.name} {r.dataset.split} ({numbers.count(r.dataset.n)})" for r in results],
        "threat model": [numbers.threat(r.threat) for r in results],
        "attack policy": [str(r.policy.get("name", "unnamed")) for r in results],
        "seed": [str(r.seed) for r in results],
    }
    # what a verdict is held against says nothing about how hard the attacks were: `bounds` may differ
    exact: dict[str, list[Any]] = {
        "images": [(r.dataset.sha256, r.dataset.n) for r in results],
        "threat model": [(r.threat.norm, r.threat.eps) for r in results],
        "attack policy": [sorted((k, str(v)) for k, v in r.policy.items() if k != "bounds") for r in results],
        "seed": [r.seed for r in results],
    }
    return [
        f"These audits used different {_plural(name)}: {', '.join(dict.fromkeys(seen[name]))}."
        for name, values in exact.items()
        if any(value != values[0] for value in values)
    ]


def _plural(name: str) -> str:
    return {"attack policy": "attack policies"}.get(name, name if name.endswith("s") else f"{name}s")
