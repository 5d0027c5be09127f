"""How often the verdict is wrong: `python -m bench verdict [--draws N] [--seed S] [--json]`.

Audits are drawn from a known truth (n images, share of images on which exactly one side is right, true drop) and
judged by the product's own rule. Beside the share of draws stands the exact probability, summed over all tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from robustkd.auditing.verdict import Counts, Pair, judge
from robustkd.recipe.policy import AuditConfig

DRAWS, SEED = 4000, 0
STATUSES = ("pass", "fail", "inconclusive")


class Truth(NamedTuple):
    """A true drop and discordance, an audit's size and its tolerance; shares, not percent."""

    n: int
    discordance: float
    drop: float
    margin: float
    why: str


CASES = (
    Truth(1237, 0.02, 0.01, 0.01, "drop at the margin: a pass is false"),
    Truth(2473, 0.04, 0.01, 0.01, "drop at the margin: a pass is false"),
    Truth(618, 0.01, 0.01, 0.01, "drop at the margin: a pass is false"),
    Truth(310, 0.02, 0.02, 0.02, "drop at the margin: a pass is false"),
    Truth(1000, 0.05, 0.03, 0.03, "drop at the margin: a pass is false"),
    Truth(200, 0.08, 0.05, 0.05, "drop at the margin: a pass is false"),
    Truth(270, 0.01, 0.01, 0.01, "drop at the margin, the engine never better: a pass is false"),
    Truth(302, 0.02, 0.02, 0.02, "drop at the margin, the engine never better: a pass is false"),
    Truth(1237, 0.02, 0.0, 0.01, "no drop, n of the formula for a power of 80 %"),
    Truth(2473, 0.04, 0.0, 0.01, "no drop, n of the formula for a power of 80 %"),
    Truth(618, 0.01, 0.0, 0.01, "no drop, n of the formula for a power of 80 %"),
    Truth(1831, 0.03, 0.02, 0.01, "drop of 2 points, n of the formula to prove it"),
    Truth(605, 0.04, 0.03, 0.01, "drop of 3 points, n of the formula to prove it"),
    Truth(1000, 0.04, 0.03, 0.01, "drop of 3 points"),
)


@cache
def _status(b: int, c: int, n: int, margin: float) -> str:
    """The verdict of the product on the robust drop, with a clean accuracy that stands."""
    table = Counts(n, n, n, clean_pair=None, robust_pair=Pair(b, c))
    return judge(table, AuditConfig(tolerance=100 * margin), [])[1].status


def simulated(truth: Truth, draws: int, rng: np.random.Generator) -> dict[str, float]:
    """The share of each verdict over audits drawn from the truth."""
    b_share, c_share = (truth.discordance + truth.drop) / 2, (truth.discordance - truth.drop) / 2
    drawn = rng.multinomial(truth.n, [b_share, c_share, 1 - truth.discordance], size=draws)[:, :2]
    found: Counter[str] = Counter()
    for (b, c), times in Counter(map(tuple, drawn.tolist())).items():
        found[_status(b, c, truth.n, truth.margin)] += times
    return {status: found[status] / draws for status in STATUSES}


def exact(truth: Truth) -> dict[str, float]:
    """The probability of each verdict; tables of a probability below 1e-9 together are left out."""
    found: Counter[str] = Counter()
    lost = (truth.discordance + truth.drop) / (2 * truth.discordance)
    for d in range(int(binom.isf(5e-10, truth.n, truth.discordance)) + 1):
        weight = binom.pmf(d, truth.n, truth.discordance)
        if weight < 1e-12:
            continue
        for b, share in enumerate(binom.pmf(range(d + 1), d, lost)):
            if weight * share > 1e-12:
                found[_status(b, d - b, truth.n, truth.margin)] += float(weight * share)
    return {status: found[status] for status in STATUSES}


def rows(draws: int = DRAWS, seed: int = SEED) -> list[dict[str, object]]:
    """Every case with its simulated and exact shares."""
    rng = np.random.default_rng(seed)
    return [{**case._asdict(), "simulated": simulated(case, draws, rng), "exact": exact(case)} for case in CASES]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench verdict", description="How often the verdict is wrong.")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    asked = parser.parse_args(argv)
    found = rows(asked.draws, asked.seed)
    if asked.json:
        print(json.dumps({"draws": asked.draws, "seed": asked.seed, "rows": found}))
    else:
        print(table(found))
    return 0


def table(found: list[dict[str, object]]) -> str:
    """The rows in Markdown, in percent: share of the draws, and the exact probability in brackets."""
    lines = ["| n | discordance | true drop | margin | pass | fail | inconclusive | |", "|---|---|---|---|---|---|---|---|"]
    for row in found:
        simulated_, exact_ = row["simulated"], row["exact"]
        cells = [f"{100 * simulated_[s]:.1f} ({100 * exact_[s]:.1f})" for s in STATUSES]  # type: ignore[index]
        shares = [f"{100 * float(str(row[key])):.0f} %" for key in ("discordance", "drop", "margin")]
        lines.append("| " + " | ".join([str(row["n"]), *shares, *cells, str(row["why"])]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
