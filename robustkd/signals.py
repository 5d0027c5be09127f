"""Ctrl-C and SIGTERM leave a state that can be resumed: loops ask `check()` where they can stop cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustkd.errors import Interrupted

_received: list[int] = []
_inside: list[bool] = []


@contextmanager
def graceful() -> Iterator[None]:
    """Record the first signal instead of dying of it; a second one stops at once.

    Inside another `graceful()`, or beside the main thread (which alone receives signals), nothing is changed.
    """
    if _inside or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(signum: int, frame: FrameType | None) -> None:
        if _received:
            raise Interrupted(signum)
        _received.append(signum)

    _received.clear()
    _inside.append(True)
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        _inside.clear()
        _received.clear()
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
