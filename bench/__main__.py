"""`python -m bench [NAME] [--quick] [--json]`, and `python -m bench verdict`, which measures no times."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.timing import Row
from robustkd.bundle import hardware, versions

NAMES = ("startup", "step", "augment")
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str]) -> int:
    if argv[:1] == ["verdict"]:  # no times: how often a verdict is wrong
        from bench.verdict import main as verdict

        return verdict(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ratios above 1 mean ours is faster.")
    parser.add_argument("name", nargs="?", choices=NAMES, help="left out: all of them")
    parser.add_argument("--quick", action="store_true", help="fewer samples; under two minutes on two idle cores")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    asked = parser.parse_args(argv)
    results = [measure(name, quick=asked.quick) for name in ((asked.name,) if asked.name else NAMES)]
    if asked.json:
        print(
            json.dumps({"rows": [row for found in results for row in found["rows"]], "environment": results[0]["environment"]})
        )
    else:
        print("\n\n".join(table(found) for found in results))
    return 0


def measure(name: str, *, quick: bool) -> dict[str, Any]:
    """Run one benchmark, and keep its result in bench/results."""
    found = {"rows": [], "environment": environment(quick=quick)}
    for row in importlib.import_module(f"bench.{name}").rows(quick=quick):
        print(f"{row['case']}: {row['ratio']:.2f}", file=sys.stderr)
        found["rows"].append(row)
    write(RESULTS / f"{name}.json", found)
    return found


def environment(*, quick: bool) -> dict[str, Any]:
    """Where and under which load the figures arose; sets torch to as many threads as cores are idle."""
    import torch

    from robustkd.training.threads import choose

    threads, _ = choose(None)
    torch.set_num_threads(threads)
    return {
        "hardware": hardware(),
        "versions": versions(),
        "device": "cpu",
        "threads": threads,
        "load_before": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(file: Path, value: dict[str, Any]) -> None:
    """Write JSON so that a stopped run leaves the old result."""
    file.parent.mkdir(exist_ok=True)
    unfinished = file.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(file)


def table(found: dict[str, Any]) -> str:
    """The rows for people; times are medians, ranges least to largest."""
    where = found["environment"]
    head = f"{where['hardware']['cpu']}, {where['threads']} threads, torch {where['versions'].get('torch')}"
    lines = [f"{head}, load before {where['load_before']}; ratio above 1: ours is faster"]
    return "\n".join([*lines, *(_line(row) for row in found["rows"])])


def _line(row: Row) -> str:
    low, high = row["ratio_range"]
    ours, reference = 1000 * row["ours"], 1000 * row["reference"]
    times = f"ours {ours:7.1f} ms   reference {reference:7.1f} ms"
    return f"{row['case']:40s} {row['ratio']:5.2f} ({low:.2f} to {high:.2f})   {times}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
