"""Audits side by side, and whether they may be compared at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkd.reporting import numbers
from robustkd.result import AuditResult

#: error allowed to all claims together
ALPHA = 0.05


def compare(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """One row per audit: artifact, precision, accuracies with intervals, drop against the source, verdict. Fractions.

    `p` is the p value of the claim that every bound on an accuracy is met, None where nothing was claimed; `p_holm` is
    adjusted for all the claims side by side, and `pass_jointly` says whether a pass still holds then.
    """
    return [_row(result) | joint for result, joint in zip(results, _jointly(results), strict=True)]


def _jointly(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    from robustkd.stats import holm

    claims = [claim_p(result) for result in results]
    adjusted = iter(holm([p for p in claims if p is not None]))
    rows = []
    for result, p in zip(results, claims, strict=True):
        p_holm = next(adjusted) if p is not None else None
        sure = result.verdict.status == "pass" and p_holm is not None and p_holm <= ALPHA
        rows.append({"p": p, "p_holm": p_holm, "pass_jointly": sure})
    return rows


def claim_p(result: AuditResult) -> float | None:
    """The p value of "all bounds on accuracies are met": the largest of theirs, on the scale where 0.05 decides.

    None where there is no bound, the figures cannot be trusted, or the result is of a version without the counts.
    """
    from robustkd.stats import drop_p, floor_p  # scipy takes a while to load, and a page needs none of it

    bounds = result.policy.get("bounds") or {}
    gates, d, n = bounds.get("gates") or {}, result.difference, result.dataset.n
    tolerance = bounds.get("tolerance")
    found = []
    if d is not None:
        for b, c, key in ((d.clean_b, d.clean_c, "clean_drop"), (d.b, d.c, "robust_drop")):
            margin = gates.get(key, tolerance)
            if b is None or c is None or margin is None:
                return None
            found.append(drop_p(b, c, n, margin / 100) if 0 < margin < 100 else float(margin <= 0))
    for seen, key in ((result.engine.clean_accuracy, "min_clean"), (result.engine.robust_accuracy, "min_robust")):
        floor = gates.get(key, bounds.get(key))
        if floor is not None:
            # a floor is held against a two-sided interval, which gives each side half the error
            found.append(min(1.0, 2 * floor_p(round(seen.estimate * n), n, floor / 100)))
    return max(found) if found and result.verdict.status != "invalid" else None


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
