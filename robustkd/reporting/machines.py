"""What CI systems take: a JUnit file, and a Markdown summary that is appended to a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from robustkd.bundle import write_atomic
from robustkd.errors import ArtifactError, ConfigError
from robustkd.reporting import numbers
from robustkd.reporting.junit import junit
from robustkd.reporting.markdown import summary
from robustkd.result import AuditResult

GITHUB = "GITHUB_STEP_SUMMARY"


def place(summary_to: Path | None, junit_to: Path | None) -> Path | None:
    """The file of a summary; `github` means the one that a GitHub workflow names.

    Raises:
        ConfigError: `github` outside a GitHub workflow.
        ArtifactError: a folder is missing; better said now than after hours of attack.
    """
    for file in (summary_to, junit_to):
        if file is not None and not file.parent.is_dir():
            raise ArtifactError("the folder does not exist", where=str(file.parent), fix=f"mkdir -p {file.parent}")
    if summary_to is None or str(summary_to) != "github":
        return summary_to
    named = os.environ.get(GITHUB)
    if not named:
        raise ConfigError(f"{GITHUB} is not set", where="--summary github", fix="run it in a GitHub workflow, or name a file")
    return Path(named)


def tell(results: Sequence[AuditResult], *, junit_to: Path | None, summary_to: Path | None) -> None:
    """Write the JUnit file, and append the summary to what is there.

    Raises:
        ArtifactError: a file cannot be written.
    """
    if junit_to is not None:
        write_atomic(junit_to, junit(results).encode("utf-8", "xmlcharrefreplace"))
    if summary_to is not None:
        text = "\n".join(f"## {numbers.short(r.artifact.path)}\n\n{summary(r)}" for r in results)
        try:
            with summary_to.open("a", encoding="utf-8", errors="replace") as stream:
                stream.write(text + "\n")
        except OSError as error:
            raise ArtifactError(
                f"cannot write the summary: {error.strerror}", where=str(summary_to), fix="name another file"
            ) from error
