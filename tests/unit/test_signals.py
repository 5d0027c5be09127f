"""The first signal asks for a clean stop, the second one stops at once."""

from __future__ import annotations

import os
import signal

import pytest

from robustkd import signals
from robustkd.errors import Interrupted


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted_second_interrupts(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with signals.graceful():
        signals.check()
        os.kill(os.getpid(), signum)
        assert signals.received() == signum
        with pytest.raises(Interrupted) as caught:
            signals.check()
        assert caught.value.signum == signum
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)
            signals.check()
    assert signal.getsignal(signum) is before


def test_an_old_signal_does_not_stop_a_new_run() -> None:
    with signals.graceful():
        os.kill(os.getpid(), signal.SIGTERM)
    with signals.graceful():
        assert signals.received() is None
        signals.check()


def test_handlers_come_back_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="bug"), signals.graceful():
        raise ValueError("bug")
    assert signal.getsignal(signal.SIGINT) is before
