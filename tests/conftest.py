"""Settings of every test: one CPU thread, no deadline for hypothesis (CI machines stall), data root unset."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("robustkd", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("robustkd")


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tester's own data and runs folders must not leak into a test."""
    monkeypatch.delenv("ROBUSTKD_DATA", raising=False)
    monkeypatch.delenv("ROBUSTKD_RUNS", raising=False)
