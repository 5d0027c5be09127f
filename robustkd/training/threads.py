"""How many CPU threads to use: on a busy machine more threads than idle cores are several times slower than one."""

from __future__ import annotations

import os
import time
from pathlib import Path

GLANCE_S = 0.3


def cores() -> int:
    """The cores this process may use, or fewer where OMP_NUM_THREADS says so."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(found, int(said)) if said.isdecimal() and int(said) else found


def load() -> float:
    """How many cores other work keeps busy now; 0 where the system does not say.

    The one-minute average still holds what has just ended (an installation, say), so where the system tells how
    long its cores were idle, a glance of 0.3 s may correct it downwards.
    """
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if average < 0.5 or not (before := _busy_ticks()):
        return average
    time.sleep(GLANCE_S)
    return min(average, (_busy_ticks() - before) / (GLANCE_S * os.sysconf("SC_CLK_TCK")))


def _busy_ticks() -> int:
    """Clock ticks that all cores together have worked since the system started; 0 where it does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0
    user, nice, system, _idle, _waiting, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return user + nice + system + sum(rest[:3])


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
