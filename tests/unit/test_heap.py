"""What a step frees stays with the process until the run ends; other C libraries are left alone."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from robustkd import heap

PROBE = """
import resource, torch
from robustkd.heap import kept

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def step():
    blocks = [torch.ones(6_000_000) for _ in range(12)]  # 24 MB each, freed together
    return sum(float(block[-1]) for block in blocks)

with kept():
    step(), step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    inside = resident()
print(inside - resident())
"""


@pytest.mark.skipif(heap._glibc() is None or sys.platform != "linux", reason="needs glibc")
def test_steps_after_the_first_ask_the_system_for_nothing_until_the_end():
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, stdout=subprocess.PIPE, text=True)
    asked, given_back = map(int, done.stdout.split())
    pages = 12 * 24_000_000 // resource.getpagesize()
    assert asked < pages / 4
    assert given_back > pages / 2


@pytest.mark.skipif(heap._glibc() is None, reason="needs glibc")
def test_the_c_library_is_told(monkeypatch):
    class Libc:
        def __init__(self) -> None:
            self.told: list[tuple[int, int]] = []

        def mallopt(self, name: int, value: int) -> None:
            self.told.append((name, value))

        def malloc_trim(self, pad: int) -> None:
            self.told.append((0, pad))

    libc = Libc()
    monkeypatch.setattr(heap, "_glibc", lambda: libc)
    with pytest.raises(ValueError, match="mine"), heap.kept():
        assert libc.told == [(-3, 32 * 2**20), (-1, 2**31 - 1)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        raise ValueError("mine")
    assert libc.told[2:] == [(-1, 64 * 2**20), (0, 0)]


def test_without_glibc_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.kept():
        assert torch.ones(3).sum() == 3
