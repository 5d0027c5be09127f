"""Who vouches for an engine: the bundle it lies in. Plans can hold code that runs on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from robustkd.bundle import MANIFEST, Bundle
from robustkd.errors import ArtifactError


class Vouched(NamedTuple):
    """What the manifest around an engine says; empty without one."""

    precision: str = "unknown"
    facts: dict[str, Any] = {}  # noqa: RUF012  # never changed
    bundle: Bundle | None = None


def vouched(path: Path) -> Vouched:
    """The manifest beside a file, if it is a sealed bundle that lists the file under the digest it has.

    Raises:
        ArtifactError: the bundle lists the file, and it or another of its files has changed.
    """
    if not (path.parent / MANIFEST).is_file():
        return Vouched()
    bundle = Bundle.open(path.parent, check=False)
    if path.name not in bundle.manifest.files:
        return Vouched()
    bundle.verify()
    extra = bundle.manifest.model_extra or {}
    return Vouched(bundle.manifest.precision, dict(extra.get("engine") or {}), bundle)


def demand_trust(path: Path, known: Vouched, *, trust: bool) -> None:
    """Refuse a plan that nobody vouches for, and one with code of its own, unless the user trusts it.

    Raises:
        ArtifactError: it may not be loaded.
    """
    if trust:
        return
    if known.bundle is None:
        raise ArtifactError(
            "no manifest vouches for this engine, and engines can hold code that runs on this machine",
            where=str(path),
            fix="name the bundle it came in, or give --trust-engine if you know who built it",
        )
    if known.facts.get("version_compatible"):
        raise ArtifactError(
            "a version-compatible engine holds code that runs on this machine",
            where=str(path),
            fix="give --trust-engine if you know who built it, or export it without version compatibility",
        )
