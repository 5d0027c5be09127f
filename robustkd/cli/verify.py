"""`robustkd verify`: is every file what its manifest says, and where does the bundle come from?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustkd.cli._print import Json, emit
from robustkd.errors import ArtifactError

if TYPE_CHECKING:
    from robustkd.bundle import Bundle


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a run folder: then every bundle in it.")],
    parents: Annotated[
        list[Path] | None,
        typer.Option("--parents", metavar="DIR", help="Where else to look for parents; may be repeated."),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Check the bundle's own files only, not where it comes from.")] = False,
    json: Json = False,
) -> None:
    """Check the digests of a bundle and its chain of parents up to the first one."""
    chains = [_chain(path, parents or [], alone=alone) for path in _bundles(bundle)]
    _prove(chains)
    if json:
        emit({"status": "ok", "bundles": chains})
        return
    for chain in chains:
        for depth, link in enumerate(chain):
            arrow = "from " if depth else ""
            typer.echo(f"{'  ' * depth}{arrow}{link['kind']} {link['path']}: {link['files']} file(s) match their digests")
            for what, digest in link.get("audited", {}).items():
                typer.echo(f"{'  ' * depth}  audited {what.replace('_', ' ')}: {digest}")
    typer.echo("digests match" if alone else "digests and chain of parents match")


def _prove(chains: list[list[dict[str, Any]]]) -> None:
    """Add to every audit what it is about, after comparing that with the bundles above it."""
    from robustkd.bundle import Bundle
    from robustkd.reporting.custody import prove

    for chain in chains:
        if chain[0]["kind"] == "audit":
            chain[0]["audited"] = prove([Bundle.open(Path(link["path"]), check=False) for link in chain])


def _bundles(path: Path) -> list[Path]:
    from robustkd.bundle import MANIFEST

    if not path.is_dir():
        raise ArtifactError("this is not a folder", where=str(path), fix="name a bundle: a folder with manifest.json")
    if (path / MANIFEST).is_file():
        return [path]
    found = sorted(file.parent for file in path.rglob(MANIFEST))
    if not found:
        raise ArtifactError(
            "not a bundle: there is no manifest.json",
            where=str(path),
            fix="name a folder that export or distill wrote",
        )
    return found


def _chain(path: Path, places: list[Path], *, alone: bool) -> list[dict[str, Any]]:
    """The bundle and its ancestors, each with its files compared.

    Raises:
        ArtifactError: a file has changed, or a parent is nowhere to be found, which a changed parent is as well.
    """
    from robustkd.bundle import Bundle

    links = []
    bundle: Bundle | None = Bundle.open(path)
    while bundle is not None:
        manifest = bundle.manifest
        links.append(
            {
                "path": str(bundle.path),
                "kind": manifest.kind,
                "digest": bundle.digest,
                "files": len(manifest.files),
                "parent": manifest.parent,
                "created": manifest.created,
            }
        )
        bundle = None if alone or manifest.parent is None else _parent(bundle, places)
    return links


def _parent(child: Bundle, places: list[Path]) -> Bundle:
    from robustkd.bundle import MANIFEST, Bundle, sha256

    home = child.path.resolve()
    for place in (*places, home.parent, home.parent.parent):
        for file in (place / MANIFEST, *sorted(place.glob(f"*/{MANIFEST}"))):
            if file.is_file() and file.parent.resolve() != home and sha256(file) == child.manifest.parent:
                return Bundle.open(file.parent)
    raise ArtifactError(
        f"the parent of this bundle is not here, or has changed: no manifest with digest {child.manifest.parent}",
        where=str(child.path),
        fix="name the folder it is in with --parents DIR, or check this bundle's own files only with --alone",
    )
