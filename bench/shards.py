"""shards: an audit cut in two, both halves at once, against the whole; every process has one thread.

Both are command lines as a user types them, start and merging included. Attacks alone: the sanity checks are the whole
audit's and run once, in the shard that ends last, so with them the ratio depends on the policy. The results must be equal
but for their times.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.audit import NAME, command
from bench.startup import ROOT
from bench.timing import Row, row

PARTS = 2
#: AutoAttack's APGD with fewer targets, and a fifth of its Square; no check, and nothing that is timed
POLICY = """noise_draws: 1
pgd_steps: 0
apgd_steps: 100
targets: 3
square_queries: 1000
uint8: none
ladder_images: 0
scale_images: 0
memory_images: 0
fresh_process: false
"""
CHUNK = 128  # images of a batch: a shard is a number of whole chunks


def rows(*, quick: bool) -> Iterator[Row]:
    n = CHUNK * (2 if quick else 8)
    pairs = [_pair(n) for _ in range(1 if quick else 3)]
    yield {**row(f"shards/{PARTS}/{NAME}", [seconds for seconds, _ in pairs]), "n": n, "equal": all(same for _, same in pairs)}


def _pair(n: int) -> tuple[tuple[float, float], bool]:
    """Seconds of both shards at once and of the whole, and whether their results are equal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(POLICY)
        began = time.perf_counter()
        for shard in [_start(folder, n, "cut", "--shard", f"{i}/{PARTS}") for i in range(1, PARTS + 1)]:
            _ended(shard)
        cut = time.perf_counter() - began
        began = time.perf_counter()
        _ended(_start(folder, n, "whole"))
        whole = time.perf_counter() - began
        return (cut, whole), _figures(folder / "cut") == _figures(folder / "whole")


def _start(folder: Path, n: int, output: str, *more: str) -> subprocess.Popen[bytes]:
    line = command(folder, n, output, "--min-robust", 50, *more)
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait; a verdict of any kind is an end, anything else is none."""
    if process.wait() not in (0, 10, 11, 12):
        raise RuntimeError(f"an audit ended with exit code {process.returncode}")


def _figures(folder: Path) -> Any:
    """What an audit found, without times and paths."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k not in ("seconds", "latency", "created", "path")}
        return [bare(v) for v in value] if isinstance(value, list) else value

    return bare(json.loads((folder / "result.json").read_text()))
