"""C sources of libraries that tests put in the place of NVIDIA's, and the compiler that makes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compiled(source: str, goal: Path, *options: str) -> Path:
    """A shared library made of `source`; the test is skipped where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: cc, gcc and clang are not found")
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", str(goal), str(HERE / source)], check=True)
    return goal
