"""How much memory is left to this process."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS = tuple(
    (Path("/sys/fs/cgroup") / limit, Path("/sys/fs/cgroup") / used)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
)
"""Limit and use of a container's memory, of either version."""


def spare() -> int | None:
    """Bytes that may be taken before the system or its container runs short; None where neither says."""
    found = [_available(), *(_left(*files) for files in CGROUPS)]
    return min((told for told in found if told is not None), default=None)


def _available() -> int | None:
    for line in _read(MEMINFO).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[0].isdecimal():
            return 1024 * int(value.split()[0])
    return None


def _left(limit: Path, used: Path) -> int | None:
    most, now = _read(limit).strip(), _read(used).strip()
    return max(0, int(most) - int(now)) if most.isdecimal() and now.isdecimal() else None  # "max" where there is none


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
