"""Ctrl-C and SIGTERM leave a state that can be resumed: loops ask `check()` where they can stop cleanly."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustkd.errors import Interrupted

_received: list[int] = []


@contextmanager
def graceful() -> Iterator[None]:
    """Record the first signal instead of dying of it; a second one stops at once."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(signum: int, frame: FrameType | None) -> None:
        if _received:
            raise Interrupted(signum)
        _received.append(signum)

    _received.clear()
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def received() -> int | None:
    """The signal that asked for a stop, if one did."""
    return _received[0] if _received else None


def check() -> None:
    """Stop here if a signal asked for it.

    Raises:
        Interrupted: a signal has arrived since `graceful()` was entered.
    """
    if _received:
        raise Interrupted(_received[0])
