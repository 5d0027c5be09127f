"""What a step frees stays with the process until the run ends; other C libraries are left alone."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from robustkd.training import heap

PROBE = """
import resource, sys, torch
from contextlib import contextmanager
from robustkd.training import heap

@contextmanager
def given_back():
    libc = heap._glibc()
    libc.mallopt(heap.MMAP_THRESHOLD, heap.LARGEST)
    libc.mallopt(heap.TRIM_THRESHOLD, 128 * 1024)  # what glibc begins with
    yield

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    blocks = [torch.ones(6_000_000) for _ in range(12)]  # 24 MB each, freed together
    return sum(float(block[-1]) for block in blocks)

with heap.kept() if sys.argv[1] == "kept" else given_back():
    step(); step()
    before = faults()
    for _ in range(5):
        step()
    print(faults() - before)
    inside = int(open("/proc/self/statm").read().split()[1])
print(inside - int(open("/proc/self/statm").read().split()[1]))
"""


@pytest.mark.skipif(heap._glibc() is None or sys.platform != "linux", reason="needs glibc")
def test_steps_after_the_first_ask_the_system_for_nothing():
    told = {}
    for mode in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", PROBE, mode], check=True, stdout=subprocess.PIPE, text=True)
        told[mode] = [int(word) for word in done.stdout.split()]
    pages = 12 * 24_000_000 // resource.getpagesize()
    assert told["kept"][0] < pages / 4 < told["given back"][0]
    assert told["kept"][1] > pages / 2, "afterwards it is given back"


def test_without_glibc_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept():
        assert torch.ones(3).sum() == 3


def test_an_error_inside_passes():
    with pytest.raises(ValueError, match="mine"), heap.kept():
        raise ValueError("mine")
