"""Memory that one step frees is kept for the next, where the C library is glibc.

By itself it gives large blocks back to the system, which clears them page by page when they are asked for again: at the
papers' batch of 128 images a step on a CPU spends a third of its time on that (docs/performance.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's `mallopt`: bytes from which a block is mapped by itself, and free bytes that are given back."""
LARGEST = 32 * 2**20
"""The largest threshold that glibc takes, and the one it comes to by itself."""


@contextmanager
def kept() -> Iterator[None]:
    """Keep what is freed inside; afterwards all of it is given back."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        libc.malloc_trim(0)


def _glibc() -> Any | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
