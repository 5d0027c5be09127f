"""What the documents tell people to type exists: commands, options, names, make targets, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustkd.cli import _lazy, _stock
from robustkd.cli._errors import UsageError
from robustkd.resources import shipped
from tests.conftest import ROOT

DOCUMENTS = sorted([*(ROOT / "docs").glob("**/*.md"), *ROOT.glob("*.md")])
_FENCE = re.compile(r"^```(?:bash|sh|console|shell)?\n(.*?)^```", re.M | re.S)
_INLINE = re.compile(r"`((?:robustkd|make) [^`]+)`")


def _typed(document: Path) -> Iterator[str]:
    """Every command line of a document, in fences and in the text; continuation lines joined."""
    text = document.read_text(encoding="utf-8")
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            _, launched, command = line.partition(" -m robustkd ")  # torchrun, accelerate launch
            yield f"robustkd {command}" if launched else line
    for inline in _INLINE.findall(_FENCE.sub("", text)):
        yield " ".join(inline.split())


def _lines(program: str) -> list[tuple[str, str]]:
    """(document, command line) of a program; ones with a placeholder such as `...` or `NAME|OTHER` are usage, not examples."""
    found = {
        (document.name, line)
        for document in DOCUMENTS
        for line in _typed(document)
        if line.split(" ")[0] == program and not re.search(r"\.\.\.|\||…|\[", line)
    }
    return sorted(found)


def _shelled(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


def test_there_are_documents_with_commands() -> None:
    assert {"index.md", "quickstart.md", "CONTRIBUTING.md"} <= {document.name for document in DOCUMENTS}
    assert len(_lines("robustkd")) >= 10


@pytest.mark.parametrize(("document", "line"), _lines("robustkd"))
def test_every_robustkd_line_parses(document: str, line: str) -> None:
    words = [word for word in _shelled(line) if word != "--debug"]
    if not words or words[0].startswith("-"):
        assert set(words) <= {"--version", "--help", "--install-completion"}
        return
    name, *rest = words
    if rest == ["--help"]:
        assert name in _lazy.COMMANDS
        return
    if not rest and name in _lazy.COMMANDS:
        return  # the command's name in running text
    command = _lazy.load(name)
    try:
        command.make_context(name, rest)
    except UsageError as error:
        pytest.fail(f"{document}: {line}: {error}")


@pytest.mark.parametrize(("document", "line"), _lines("robustkd"))
def test_every_shipped_name_exists(document: str, line: str) -> None:
    """`--recipe NAME` without a path, `show KIND NAME` and `list KIND` name something that ships."""
    words = _shelled(line)
    for option, names in (("--recipe", shipped("recipe")), ("--target", shipped("target"))):
        for value in (words[i + 1] for i, word in enumerate(words) if word == option):
            gpus = option == "--target" and re.fullmatch(r"sm\d+(,sm\d+)*", value)
            assert value in names or value.endswith(".yaml") or gpus, f"{document}: {line}"
    if words[:1] == ["list"] and len(words) > 1:
        assert words[1] in _stock.KINDS, f"{document}: {line}"
    if words[:1] in (["show"], ["copy"]) and len(words) > 2:
        names = [row["name"] for row in _stock.stock({"policy": "policies"}.get(words[1], f"{words[1]}s"))]
        assert words[2] in names, f"{document}: {line}"


@pytest.mark.parametrize(("document", "line"), _lines("make"))
def test_every_make_target_exists(document: str, line: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    words = [word for word in _shelled(line) if "=" not in word]
    assert set(words) <= targets, f"{document}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
