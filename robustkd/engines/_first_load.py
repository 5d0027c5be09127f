"""Load an engine for the first time in a process of its own, so that a crash of the library becomes an error.

    python -m robustkd.engines._first_load KIND FILE TRUST

The child deserialises the plan and runs one batch; its last line on stdout is `ok`, or what was refused.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from robustkd.engines._plan import PlanKind
from robustkd.errors import ArtifactError, RobustKDError

SECONDS = 600


def first_load(kind: PlanKind, path: Path, *, trust: bool, command: Sequence[str] = ()) -> None:
    """Run the child and turn whatever happens to it into an error.

    Args:
        kind: classic or RTX.
        path: the plan.
        trust: whether code inside the plan may run.
        command: the child, for tests.

    Raises:
        ArtifactError: the child ended by a signal, took too long, or refused the plan.
    """
    argv = [*(command or (sys.executable, "-m", "robustkd.engines._first_load")), kind, str(path), str(int(trust))]
    fix = "build it again on this machine: `robustkd export BUNDLE --" + kind + "` with the ONNX file it was made from"
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"loading {path.name} took more than {SECONDS} seconds", where=str(path), fix=fix) from error
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and said == "ok":
        return
    if done.returncode < 0:
        raise ArtifactError(f"loading {path.name} crashes: {_signal(-done.returncode)}", where=str(path), fix=fix)
    reason = said or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise ArtifactError(f"{path.name} does not load here: {reason}", where=str(path), fix=fix)


def _signal(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"


def main(kind: str, path: str, trust: str) -> int:
    """The child's work."""
    import numpy as np

    from robustkd.engines._session import Session
    from robustkd.engines._tensorrt import library

    name: PlanKind = "rtx" if kind == "rtx" else "trt"
    try:
        session = Session(library(name), name, Path(path), trust=trust == "1")
        size = session.profile[0]
        session.run(np.zeros((size, *session.shape), np.float32))
        session.close()
    except RobustKDError as error:
        sys.stdout.write(error.what.replace("\n", " ") + "\n")
        return 1
    sys.stdout.write("ok\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
