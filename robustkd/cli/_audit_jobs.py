"""`robustkd audit --jobs N`: all shards of an audit at once, each in a process of its own with its part of the cores.

The operators of a network of edge size are too short to be shared between cores; whole batches are not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from typing import Any

import typer

from robustkd.cli._audit_view import Trust, option
from robustkd.cli._print import say
from robustkd.errors import ConfigError
from robustkd.result import EXIT
from robustkd.signals import check, graceful
from robustkd.training.threads import cores

#: options that the process which merges takes for itself, and those that two shards at once cannot have
OWN, ALONE = ("jobs", "save_kit"), ("shard", "merge", "stochastic")
OFTEN_S = 0.1


def shards_at_once(artifact: str, asked: dict[str, Any], bounds: dict[str, Any], trust: Trust) -> None:
    """Finish every shard; what remains is to merge them.

    Args:
        artifact: the command's argument.
        asked: the options that were given, `jobs` among them.
        bounds: what the verdict is held against, and where the audit is written.
        trust: what may run code when it is loaded.

    Raises:
        ConfigError: an option does not go with several processes.
        Interrupted: a signal asked for a stop; every shard has kept what it has.
        typer.Exit: a shard failed, and has said why; the others are stopped.
    """
    if wrong := [option(key) for key in ALONE if key in asked]:
        raise ConfigError(f"--jobs divides the audit itself, beside {', '.join(wrong)}", where="--jobs", fix="leave one out")
    jobs = asked["jobs"]
    trusted = {"trust_engine": trust.engine, "trust_pickle": trust.pickle}
    flags = _flags({**{key: value for key, value in asked.items() if key not in OWN}, **bounds, **trusted})
    command = [sys.executable, "-m", "robustkd", "audit", artifact, *flags, "--no-merge", "--shard"]
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    running: list[_Shard] = []
    with graceful():
        try:
            for number in range(1, jobs + 1):
                running.append(_Shard([*command, f"{number}/{jobs}"], {**os.environ, **threads}))
            threading.Thread(target=import_module, args=("robustkd.auditing.verb",), daemon=True).start()  # for merging
            while any(shard.code is None for shard in running):
                check()
                _none_failed(running)
                time.sleep(OFTEN_S)
            _none_failed(running)
        finally:
            for shard in running:
                shard.stop()


def _none_failed(running: list[_Shard]) -> None:
    """Leave as the first shard did that has no result."""
    for shard in running:
        if (code := shard.code) is not None and code not in EXIT.values():
            raise typer.Exit(code if code > 0 else 128 - code)


def _flags(options: dict[str, Any]) -> list[str]:
    """Options as they are typed."""
    flags: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        flags += [option(key)] if value is True else [option(key), str(value)]
    return flags


class _Shard:
    """A process at work; what it says of its work is said on."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._name = command[-1]
        # of a session of its own: Ctrl-C reaches this process alone, which passes it on once
        self._process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def _tell(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                say(f"[{self._name}] {line.rstrip()}")

    @property
    def code(self) -> int | None:
        """The exit code, once it has ended and all it said is told."""
        code = self._process.poll()
        if code is not None:
            self._teller.join()
        return code

    def stop(self) -> None:
        """Ask it, where it still runs, to keep what it has and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._teller.join()
