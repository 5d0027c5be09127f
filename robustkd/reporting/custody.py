"""What an audit bundle proves: digests that tie its result to engine, source, images, attacks and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkd.bundle import Bundle
from robustkd.errors import ArtifactError
from robustkd.reporting.inputs import RESULT, read_result


def prove(chain: Sequence[Bundle]) -> dict[str, str]:
    """The digests of an audit, compared with its manifest and with the bundles above it, which come first to last.

    Raises:
        ArtifactError: the result is about another file than its parent holds, or its manifest states other digests.
    """
    audit, above = chain[0], chain[1:]
    found = read_result(audit.file(RESULT)).digests()
    stated: dict[str, Any] = getattr(audit.manifest, "audited", None) or {}
    for what, digest in stated.items():
        if found.get(what) != digest:
            raise _broken(audit, f"result.json is about another {what} than the manifest states")
    if above and found["artifact"] not in above[0].manifest.files.values():
        raise _broken(audit, "the file it audited is not in the bundle it names as its parent")
    checkpoints = [bundle for bundle in above if bundle.manifest.kind == "checkpoint"]
    source = found.get("source")
    if source and checkpoints and source not in checkpoints[0].manifest.files.values():
        found["source_note"] = "not the checkpoint that the engine was made from"
    return found


def _broken(audit: Bundle, what: str) -> ArtifactError:
    return ArtifactError(what, where=str(audit.path), fix="audit again, or find who changed it")
