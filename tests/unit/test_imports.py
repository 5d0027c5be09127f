"""What must load without torch does: a report can be rebuilt, and a bundle checked, on a machine that has none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

MODULES = ("errors", "threat", "result", "stats", "bundle", "catalog", "resources", "signals", "recipe.policy", "recipe.target")
REPORTING = sorted(f"reporting.{file.stem}" for file in (ROOT / "robustkd" / "reporting").glob("[a-z]*.py"))


@pytest.mark.parametrize("modules", [("",), MODULES, REPORTING], ids=["robustkd", "values", "reporting"])
def test_no_torch(modules: tuple[str, ...]) -> None:
    names = ", ".join(f"robustkd.{name}".rstrip(".") for name in modules)
    code = f"import sys\nimport {names}\nprint([name for name in ('torch', 'onnx', 'torchvision') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import robustkd

    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        robustkd.distil  # noqa: B018 - reading it is the test
