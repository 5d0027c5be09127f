"""A result as short text: Markdown that reads well in a terminal too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from robustkd.reporting import numbers
from robustkd.reporting.compare import compare, mismatches
from robustkd.result import AuditResult, Side

#: verdicts as one word and one sentence
VERDICTS = {
    "pass": ("Pass", "The audited file met everything it was held against."),
    "fail": ("Fail", "The audited file missed what it was held against."),
    "inconclusive": ("Inconclusive", "These figures neither prove nor refute that the file is good enough."),
    "invalid": ("Invalid", "A sanity check blocks: the figures cannot be trusted and should not be quoted."),
}

LEVELS = {
    "baseline": "no adversary: noise and shifts",
    "replay": "images made on the source, shown to the file",
    "surrogate": "values from the file, gradients from a differentiable twin",
    "blackbox": "outputs of the file only",
}


def summary(result: AuditResult) -> str:
    """Verdict, reasons, accuracies and attacks of one audit, in Markdown."""
    name, sentence = VERDICTS[result.verdict.status]
    lines = [f"**{name}**: {sentence}", ""]
    lines += [f"- {_plain(reason)}" for reason in result.verdict.reasons]
    lines += ["", _plain(f"{numbers.short(result.artifact.path)}: {facts(result)}"), ""]
    lines += _grid(("", "clean", "robust"), _accuracies(result))
    lines += (
        ["", *_grid(("attack", "level", "broken", "robust left"), _attacks(result.engine))] if result.engine.attacks else []
    )
    return "\n".join(lines).strip() + "\n"


def facts(result: AuditResult) -> str:
    """What was audited and how, on one line."""
    data, file = result.dataset, result.artifact
    return (
        f"{file.precision} on {file.runtime} {file.runtime_version} ({file.device}), "
        f"{data.name} {data.split}, {numbers.count(data.n)} images, {numbers.threat(result.threat)}"
    )


def table(results: Sequence[AuditResult]) -> str:
    """The audits side by side, in Markdown, with a note where they were not made alike."""
    compared = compare(results)
    rows = [
        (
            row["artifact"],
            row["precision"],
            _interval(row["clean_accuracy"]),
            _interval(row["robust_accuracy"]),
            numbers.points(row["drop"]["estimate"]) if row["drop"] else "",
            VERDICTS[row["verdict"]][0],
        )
        for row in compared
    ]
    lines = _grid(("artifact", "precision", "clean", "robust", "robust drop", "verdict"), rows)
    lines += ["", *(f"- {note}" for note in [*mismatches(results), *_joint(compared)])]
    return "\n".join(lines).strip() + "\n"


def _joint(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What of several passes holds when the audits are read together."""
    passes = [row for row in rows if row["verdict"] == "pass"]
    if len(rows) < 2 or not passes:
        return []
    weak = [_plain(numbers.short(row["artifact"])) for row in passes if row["p_holm"] is not None and not row["pass_jointly"]]
    if weak:
        return [f"Read together (Holm, 5 % for all claims), not shown to pass: {', '.join(weak)}. More images would decide."]
    unknown = any(row["p_holm"] is None for row in passes)
    return [] if unknown else ["Every pass also holds when the audits are read together (Holm, 5 % for all claims)."]


def command(result: AuditResult) -> str:
    """The command line that repeats an audit on the same inputs."""
    words = ["robustkd", "audit", result.artifact.path]
    if result.source is not None:
        words += ["--source", result.source.path]
    words += ["--dataset", result.dataset.name, "--n", str(result.dataset.n)]
    words += ["--norm", result.threat.norm, "--eps", numbers.eps(result.threat.eps)]
    asked = {**result.policy, **(result.policy.get("bounds") or {})}
    for key, option in _OPTIONS.items():
        if asked.get(key) is not None:
            words += [option, str(asked[key])]
    words += ["--stochastic"] if asked.get("stochastic") else []
    return shlex.join([*words, "--seed", str(result.seed)])


_OPTIONS = {"name": "--policy", "tolerance": "--tolerance", "min_robust": "--min-robust", "min_clean": "--min-clean"}


def _accuracies(result: AuditResult) -> list[tuple[str, str, str]]:
    sides = [("file", result.engine)] + ([("source", result.source_model)] if result.source_model else [])
    rows = [(name, numbers.interval(s.clean_accuracy), numbers.interval(s.robust_accuracy)) for name, s in sides]
    if (one := result.engine.per_draw) is not None:
        rows.insert(1, ("file, one draw", numbers.percent(one.clean_accuracy), numbers.percent(one.robust_accuracy)))
    if (d := result.difference) is not None:
        rows.append(("source − file, points", _difference(d.clean), _difference(d.robust)))
    return rows


def _difference(value: Any) -> str:
    return f"{numbers.points(value.estimate)} ({numbers.points(value.low)} to {numbers.points(value.high)})"


def _attacks(side: Side) -> list[tuple[str, str, str, str]]:
    return [
        (name, a.level, f"{numbers.count(a.broken)} of {numbers.count(a.images)}", numbers.percent(a.robust_accuracy))
        for name, a in side.attacks.items()
    ]


def _interval(value: dict[str, float]) -> str:
    return f"{numbers.percent(value['estimate'])} ({numbers.tenths(value['low'])} to {numbers.tenths(value['high'])})"


def _plain(text: str) -> str:
    """Text on one line that cannot start markup: control characters out, Markdown's and HTML's signs escaped."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", flat)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [list(head), *[[_plain(cell) for cell in row] for row in rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
