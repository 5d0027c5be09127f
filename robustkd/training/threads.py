"""How many CPU threads to use: on a busy machine more threads than idle cores are several times slower than one."""

from __future__ import annotations

import os


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """The one-minute load average; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def choose(wanted: int | None, *, processes: int = 1) -> tuple[int, str]:
    """The thread count of each process, and a warning (or "") when the machine is busier than it has cores."""
    available, busy = cores(), load()
    idle = max(1, min(available, round(available - busy)) // processes)
    threads = wanted or idle
    if threads > idle:
        return (
            threads,
            f"load {busy:.1f} on {available} cores: {threads} threads may be slower than {idle} (--threads {idle})",
        )
    return threads, ""
