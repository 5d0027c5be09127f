"""`python -m bench [NAME] [--quick] [--json]`; `breakdown`, `masking`, `verdict` print no ratios, and are not part of all."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.timing import Row
from robustkd.bundle import hardware, versions

NAMES = ("startup", "step", "audit", "shards", "engine", "memory", "augment")
PLACED = ("step", "audit", "engine", "memory")
"""Those that run on a device of choice."""
MODULES = {"memory": "peaks"}
"""Where the module has another name: `bench.memory` measures folders of pictures."""
APART = ("breakdown", "masking", "verdict")
USUAL = {"device": "cpu", "precision": "fp32", "speed": "auto", "batch": 0}
ALIKE = ("hardware", "versions", "device", "tf32", "threads", "quick")
"""What two runs must share for their rows to lie in one file."""
RESULTS = Path(os.environ.get("ROBUSTKD_BENCH_RESULTS") or Path(__file__).parent / "results")


def main(argv: list[str]) -> int:
    if argv[:1] and argv[0] in APART:
        apart: int = importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
        return apart
    asked = _parser().parse_args(argv)
    names = (asked.name,) if asked.name else NAMES
    place = {key: getattr(asked, key) for key in (*USUAL, "pairs")} | ({"only": tuple(asked.only)} if asked.only else {})
    results = [measure(name, quick=asked.quick, place=place) for name in names]
    if asked.json:
        joined = results[0]["environment"]
        joined["left_out"] = {key: why for found in results for key, why in found["environment"]["left_out"].items()}
        print(json.dumps({"rows": [row for found in results for row in found["rows"]], "environment": joined}))
    else:
        print("\n\n".join(table(found) for found in results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ratios above 1 mean ours is faster, or needs less.")
    parser.add_argument("name", nargs="?", choices=NAMES, help=f"left out: all of them; {' and '.join(APART)} stand apart")
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples; under ten minutes on two idle cores")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="cases such as 'dgad/mnv2/*'; may be repeated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="for step, audit, engine and memory")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "bf16-attack"),
        help="of our training step; bf16-attack: of the search too. The reference is fp32",
    )
    parser.add_argument("--speed", default="auto", choices=("auto", "safe"), help="train.speed of our training step")
    parser.add_argument("--batch", type=count, default=0, metavar="N", help="images in a step on the papers' networks")
    parser.add_argument("--pairs", type=count, default=0, metavar="N", help="how often both sides of a step are timed")
    return parser


def count(told: str) -> int:
    """A whole number above zero."""
    if (number := int(told)) < 1:
        raise ValueError
    return number


def measure(name: str, *, quick: bool, place: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run one benchmark, and keep its result in bench/results, in a file named after all that is not as usual."""
    told = place or {}
    device = told.get("device", "cpu")
    rows: list[Row] = []
    found: dict[str, Any] = {"rows": rows, "environment": environment(quick=quick, device=device)}
    odd = [str(told[key]) for key, usual in USUAL.items() if told.get(key, usual) != usual]
    file = RESULTS / ("-".join([name, *odd]) + ".json")
    others = kept(file, found["environment"]) if "only" in told else []
    for row in _rows(name, quick, told):
        if "left_out" in row:
            found["environment"]["left_out"][row["case"]] = row["left_out"]
            print(f"{row['case']}: left out, {row['left_out']}", file=sys.stderr)
            continue
        print(f"{row['case']}: {row['ratio']:.2f}", file=sys.stderr)
        rows.append({**row, "date": found["environment"]["date"]})
        fresh = {row["case"] for row in rows}
        before = [other for other in others if other["case"] not in fresh]
        write(file, {**found, "rows": [*before, *rows]})  # after each row: it survives a time limit
    return found


def kept(file: Path, here: dict[str, Any]) -> list[Row]:
    """The rows of a file that were measured as now, each with its date: some cases may be measured again by themselves."""
    if not file.is_file():
        return []
    held = json.loads(file.read_text())
    there = held["environment"]
    if any(there.get(key) != here[key] for key in ALIKE):
        return []
    return [{"date": there["date"], **row} for row in held["rows"]]


def _rows(name: str, quick: bool, place: dict[str, Any]) -> Iterator[Row]:
    module = importlib.import_module(f"bench.{MODULES.get(name, name)}")
    if name not in PLACED:
        yield from module.rows(quick=quick)
        return
    from bench.place import Place

    yield from module.rows(quick=quick, place=Place(**place))


def environment(*, quick: bool, device: str = "cpu") -> dict[str, Any]:
    """Where and under which load the figures arose; sets torch to as many threads as cores are idle."""
    import torch

    from robustkd.training.threads import choose

    threads, _ = choose(None)
    torch.set_num_threads(threads)
    return {
        "hardware": hardware(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "threads": threads,
        "load_before": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "left_out": {},
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
    if where["device"] != "cpu":
        head = f"{where['device']}; {head}"
    lines = [f"{head}, load before {where['load_before']}; ratio above 1: ours is faster, or needs less"]
    lines += [_line(row) for row in found["rows"]]
    return "\n".join([*lines, *(f"{case:44s} left out: {why}" for case, why in where["left_out"].items())])


def _line(row: Row) -> str:
    low, high = row["ratio_range"]
    scale, unit = (1000, "ms") if row["unit"] == "s" else (1, row["unit"])
    values = f"ours {scale * row['ours']:9.1f} {unit}   reference {scale * row['reference']:9.1f} {unit}"
    return f"{row['case']:44s} {row['ratio']:5.2f} ({low:.2f} to {high:.2f})   {values}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
