"""The wheel, installed elsewhere, brings its recipes, targets, data and licences, and nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustkd.resources import shipped
from tests.conftest import ROOT

MAX_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("build", reason="needs the dev extra: build")
    pytest.importorskip("hatchling", reason="needs the dev extra: hatchling")
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with only the wheel's content in it."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(target),
        str(wheel),
    ]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    yield target


def _robustkd(installed: Path, *args: str) -> str:
    """Run the installed copy, far from the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    code = (
        "import sys, robustkd; assert robustkd.__file__.startswith(sys.argv.pop(1)); from robustkd.cli.app import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), *args],
        cwd=installed.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_BYTES


def test_what_is_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = set(names)
    assert {"robustkd/py.typed", "robustkd/datasets/data/fashion_mnist_10k.npz.xz"} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("LICENSE.fashion-mnist") for name in names)
    assert {f"robustkd/_recipes/{name}.yaml" for name in shipped("recipe")} <= inside
    assert {f"robustkd/_targets/{name}.yaml" for name in shipped("target")} <= inside
    for card in (ROOT / "robustkd" / "teachers").glob("*.yaml"):
        assert f"robustkd/teachers/{card.name}" in inside
    for weights in (ROOT / "robustkd" / "teachers").glob("*.safetensors"):
        assert f"robustkd/teachers/{weights.name}" in inside


def test_nothing_of_the_checkout_is_inside(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"robustkd"}
    home = str(ROOT).encode()
    assert [name for name in archive.namelist() if home in archive.read(name)] == []


def test_the_installed_copy_lists_recipes_and_targets(installed: Path) -> None:
    for kind, names in (("recipes", shipped("recipe")), ("targets", shipped("target"))):
        listed = [line.split()[0] for line in _robustkd(installed, "list", kind).splitlines()]
        assert listed == sorted(names)
    assert "dataset:" in _robustkd(installed, "show", "recipe", "quickstart")


def test_the_installed_copy_holds_the_embedded_images(installed: Path) -> None:
    code = (
        "from robustkd.catalog import Shelf\n"
        "sets = Shelf('datasets').get('fashion-mnist-10k')(name='fashion-mnist-10k')\n"
        "print(len(sets.load('train')), len(sets.load('test')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == ["10000", "2000"], done.stderr


def test_the_script_is_declared(installed: Path) -> None:
    (entry,) = installed.glob("robustkd-*.dist-info/entry_points.txt")
    assert "robustkd = robustkd.cli.app:main" in entry.read_text()
