"""`python -m robustkd`, which is what launchers call."""

from __future__ import annotations

from robustkd.cli.app import main

main()
