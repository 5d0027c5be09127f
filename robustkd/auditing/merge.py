"""Finished shards: each is a bundle beside the audit's folder, and the last one to finish merges them all.

`DIR.shards/1-of-4` holds the pieces of shard 1/4 of the audit `DIR` and the identity they belong to.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from robustkd.auditing.shards import Shard
from robustkd.auditing.store import Store
from robustkd.bundle import MANIFEST, Bundle, create
from robustkd.errors import ArtifactError


def shards_folder(folder: Path) -> Path:
    """Where the shards of the audit `folder` lie."""
    return folder.with_name(f"{folder.name}.shards")


def shard_folder(folder: Path, shard: Shard) -> Path:
    """The bundle of one shard of the audit `folder`."""
    return shards_folder(folder) / f"{shard.number}-of-{shard.total}"


def write_shard(store: Store, folder: Path, shard: Shard, parent: Bundle | None) -> Bundle:
    """Turn the pieces of a shard into its bundle; a shard without images has an identity alone.

    Raises:
        ArtifactError: it cannot be written.
    """
    home = shard_folder(folder, shard)
    pieces = store.begin()
    with create(home, "shard", parent=parent, shard=str(shard)) as (work, _):
        for file in sorted(pieces.iterdir()):
            shutil.copyfile(file, work / file.name)
    store.remove()
    return Bundle.open(home, kind="shard")


def finished(places: Iterable[Path]) -> dict[Shard, Path]:
    """The shards in some places: audit folders, their `.shards` folders, or single shards, with every digest checked.

    Raises:
        ArtifactError: a place holds no shard, or one is damaged.
    """
    found: dict[Shard, Path] = {}
    for place in places:
        beside = shards_folder(place)
        # a name that begins with a dot is a shard at work
        folders = (
            [place] if (place / MANIFEST).is_file() else sorted((beside if beside.is_dir() else place).glob("[0-9]*-of-*"))
        )
        bundles = [Bundle.open(folder, kind="shard") for folder in folders if (folder / MANIFEST).is_file()]
        if not bundles:
            raise ArtifactError("there is no finished shard here", where=str(place), fix="name what --shard I/N wrote")
        found |= {Shard.parse(str(getattr(bundle.manifest, "shard", ""))): bundle.path for bundle in bundles}
    return found


def _folders(place: Path) -> list[Path]:
    """Folders with a manifest; a name that begins with a dot is a shard at work."""
    if (place / MANIFEST).is_file():
        return [place]
    inside = shards_folder(place) if shards_folder(place).is_dir() else place
    return sorted(file.parent for file in inside.glob(f"[0-9]*-of-*/{MANIFEST}"))


def begun(folder: Path) -> bool:
    """Whether a shard of the audit `folder` is finished and not merged."""
    return shards_folder(folder).is_dir() and bool(_folders(folder))


def missing(found: Iterable[Shard]) -> list[Shard]:
    """The shards that are not there, of the division that lacks fewest."""
    held = set(found)
    divisions = [[Shard(i, total) for i in range(1, total + 1)] for total in {shard.total for shard in held}]
    return min(([shard for shard in division if shard not in held] for division in divisions), key=len, default=[])


def complete(found: dict[Shard, Path]) -> tuple[Path, ...]:
    """The folders of all shards of the division that is complete.

    Raises:
        ArtifactError: none is; the missing shards are named.
    """
    if absent := missing(found):
        raise ArtifactError(
            f"{', '.join(map(str, absent))} of this audit's shards are missing",
            where=", ".join(str(path) for path in found.values()),
            fix=f"run it with --shard {absent[0]}, or name where it is with --merge",
        )
    totals = {shard.total for shard in found}
    total = next(t for t in sorted(totals) if all(Shard(i, t) in found for i in range(1, t + 1)))
    return tuple(found[Shard(i, total)] for i in range(1, total + 1))


def forget(folder: Path) -> None:
    """Remove the shards of an audit that is merged and written."""
    shutil.rmtree(shards_folder(folder), ignore_errors=True)
