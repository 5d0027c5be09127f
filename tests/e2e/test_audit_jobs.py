"""`robustkd audit --jobs N`: shards in processes of their own, and the audit that one process would have made."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robustkd.auditing.merge import shards_folder
from tests.conftest import Outcome
from tests.unit.test_audit_resume import plain

Command = Callable[..., Outcome]
NAME = "teacher:fashion-mnist-resnet18"
POLICY = (
    "noise_draws: 2\npgd_steps: 5\napgd_steps: 5\ntargets: 1\nfab: false\nsquare_queries: {queries}\n"
    "fresh_process: false\nladder_images: 0\nscale_images: 0\nmemory_images: 0\neffort_images: 0\n"
)


def _options(folder: Path, queries: int = 20) -> list[str]:
    policy = folder / "tiny.yaml"
    policy.write_text(POLICY.format(queries=queries))
    return ["audit", NAME, "--policy", str(policy), "--n", "40", "--batch-size", "8"]


def test_it_is_the_audit_of_one_process(cli: Command, tmp_path: Path) -> None:
    options = _options(tmp_path)
    whole, jobs = (
        cli(*options, *more, "--min-robust", 30, "--json", "--output", tmp_path / name)
        for name, more in (("whole", ()), ("jobs", ("--jobs", 2)))
    )
    assert whole.code == jobs.code == 0, jobs.stderr
    assert plain(json.loads(jobs.stdout)) == plain(json.loads(whole.stdout))
    kept = [np.load(tmp_path / name / "adversarial.npz")["x_adv"] for name in ("whole", "jobs")]
    assert np.array_equal(*kept)
    assert "[1/2] " in jobs.stderr and "[2/2] " in jobs.stderr
    assert not shards_folder(tmp_path / "jobs").exists()


def test_what_is_wrong_is_told_once_it_is_known(cli: Command, tmp_path: Path) -> None:
    done = cli(*_options(tmp_path), "--jobs", 2, "--eps", "nonsense", "--output", tmp_path / "x")
    assert done.code == 3 and "eps" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("beside", [("--shard", "1/2"), ("--merge", "there"), ("--stochastic",)])
def test_what_does_not_go_together(cli: Command, tmp_path: Path, beside: tuple[str, ...]) -> None:
    done = cli(*_options(tmp_path), "--jobs", 2, *beside)
    assert done.code == 3 and "--jobs" in done.stderr and beside[0] in done.stderr


def test_a_shard_that_leaves_merging_to_others(command: Command, tmp_path: Path) -> None:
    options = [*_options(tmp_path), "--output", "here"]
    done = command(*options, "--no-merge")
    assert done.code == 3 and "--no-merge" in done.stderr
    assert command(*options, "--shard", "1/2").code == 11
    last = command(*options, "--shard", "2/2", "--no-merge")
    assert last.code == 11 and "without --shard merges" in last.stdout
    assert not Path("here").exists()
    assert command(*options, "--min-robust", 30).code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_stopped_it_keeps_what_it_has(cli: Command, tmp_path: Path) -> None:
    options = [*_options(tmp_path, 600), "--output", str(tmp_path / "a"), "--min-robust", "30", "--jobs", "2"]
    line = [sys.executable, "-m", "robustkd", *options]
    with subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for told in process.stderr:
            if "images" in told and "pgd" in told:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert "--resume" in rest
    assert not _alive("--no-merge", str(tmp_path))
    done = cli(*_options(tmp_path, 600), "--output", tmp_path / "a", "--min-robust", 30, "--jobs", 2, "--resume")
    assert done.code == 0, done.stderr


def _alive(*words: str) -> list[str]:
    """Command lines of running processes with all these words."""
    time.sleep(0.2)
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [line] if all(word in line for word in words) else []
    return found
