"""Every error says what is wrong, where, and how to mend it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import robustkd
from robustkd.errors import ArtifactError, RobustKDError

PACKAGE = Path(robustkd.__file__).parent
KINDS = {kind.__name__ for kind in RobustKDError.__subclasses__()} - {"Interrupted"}


def raised() -> list[tuple[str, ast.Call]]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                found.append((f"{file.relative_to(PACKAGE)}:{node.lineno}", node))
    return found


@pytest.mark.parametrize(("place", "call"), raised(), ids=[place for place, _ in raised()])
def test_every_error_carries_its_remedy(place, call):
    assert {"fix"} <= {keyword.arg for keyword in call.keywords}, f"{place} gives no fix="


def test_an_error_prints_three_lines():
    assert str(ArtifactError("gone", where="here", fix="look")) == "gone\n  at: here\n  fix: look"
