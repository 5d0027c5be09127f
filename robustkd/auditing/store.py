"""What an unfinished audit keeps: each finished piece, whole or not at all, and the identity it belongs to."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkd.bundle import write_atomic, write_json
from robustkd.errors import ArtifactError

Arrays = dict[str, NDArray[Any]]
#: what NumPy and the zip reader raise for a damaged .npz: its headers are parsed as Python literals
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
IDENTITY = "identity.json"
CLOCK = "clock"


def partial_folder(folder: Path) -> Path:
    """Where the unfinished audit of `folder` lives: beside it, so that the bundle itself appears in one piece."""
    return folder.parent / f".{folder.name}.partial"


def piece_name(attack: str, chunk: int) -> str:
    """The name of one chunk of one attack."""
    return f"{attack.replace(':', '-')}-{chunk:05d}"


def read_npz(file: Path) -> Arrays:
    """Every array of a file; nothing in it can run code. Damage is one of `UNREADABLE`."""
    with warnings.catch_warnings(), file.open("rb") as stream:
        warnings.simplefilter("ignore")  # of headers that look like Python 2's
        with np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)


class Store:
    """Pieces by name; without a folder they live in memory only."""

    def __init__(self, folder: Path | None, identity: dict[str, Any], shards: tuple[Path, ...] = ()) -> None:
        self.folder, self.identity, self._shards, self._memory = folder, identity, shards, dict[str, Arrays]()

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, Any], *, resume: bool, shards: tuple[Path, ...] = ()) -> Store:
        """Start anew, or take up what an interrupted audit of the same identity left.

        Nothing is written before the first piece is finished, so an audit that never began leaves nothing.

        Args:
            folder: where pieces are kept; None keeps them in memory.
            identity: what must be equal for pieces of two runs to belong to one audit.
            resume: take up what is there.
            shards: folders of finished shards, whose pieces are read where the folder itself has none.

        Raises:
            ArtifactError: there is an unfinished audit and `resume` is not asked for, or it or a shard is of another one.
        """
        wanted = json.loads(json.dumps(identity))
        if folder is not None and (folder / IDENTITY).is_file():
            if not resume:
                raise ArtifactError(
                    "an unfinished audit is here", where=str(folder), fix="continue it with --resume, or delete that folder"
                )
            same_audit(folder / IDENTITY, wanted)
        for shard in shards:
            same_audit(shard / IDENTITY, wanted)
        return cls(folder, wanted, shards)

    def names(self) -> list[str]:
        """Every finished piece, in order."""
        folders = [folder for folder in (self.folder, *self._shards) if folder is not None]
        return sorted({*self._memory, *(file.stem for folder in folders for file in folder.glob("*.npz"))})

    def seconds(self) -> float:
        """What an interrupted run of this audit has taken, or else its shards together."""
        own = self._read(self.folder / f"{CLOCK}.npz") if self.folder else self._memory.get(CLOCK)
        clocks = [own] if own else [self._read(shard / f"{CLOCK}.npz") for shard in self._shards]
        return sum(float(clock["seconds"]) for clock in clocks if clock)

    def get(self, name: str) -> Arrays | None:
        """A finished piece, or None."""
        if name in self._memory:
            return self._memory[name]
        folders = (folder for folder in (self.folder, *self._shards) if folder is not None)
        return next((found for folder in folders if (found := self._read(folder / f"{name}.npz"))), None)

    def _read(self, file: Path) -> Arrays | None:
        if not file.is_file():
            return None
        try:
            return read_npz(file)
        except UNREADABLE as error:
            raise ArtifactError(
                "a piece of the interrupted audit is damaged", where=str(file), fix="delete this file and resume again"
            ) from error

    def put(self, name: str, arrays: Arrays) -> None:
        """Keep a finished piece; it is there whole or not at all."""
        if self.folder is None:
            self._memory[name] = arrays
            return
        folder = self.begin()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub mistakes ** for allow_pickle
        write_atomic(folder / f"{name}.npz", buffer.getvalue())

    def begin(self) -> Path:
        """The folder, with the identity in it.

        Raises:
            ArtifactError: it cannot be written, or there is none.
        """
        folder = self.folder
        if folder is None:
            raise ArtifactError("these pieces are kept in memory only", fix="give the audit a folder")
        if (folder / IDENTITY).is_file():
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot write here: {error.strerror}", where=str(folder.parent), fix="choose another --output"
            ) from error
        write_json(folder / IDENTITY, self.identity)
        return folder

    def remove(self) -> None:
        """Forget everything: the audit is finished and written."""
        self._memory.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def same_audit(file: Path, wanted: dict[str, Any]) -> None:
    """Compare a stored identity with that of the audit asked for.

    Raises:
        ArtifactError: it is damaged, or of another audit; the message names what differs.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError("the unfinished audit is damaged", where=str(file), fix="delete its folder") from error
    different = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
    if different:
        raise ArtifactError(
            f"the unfinished audit is another one: {', '.join(different)} differ",
            where=str(file),
            fix="give the same options and files as before, or choose another --output",
        )


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one audit at a time; `wait` until another lets go of it.

    Raises:
        ArtifactError: another process holds it, or the place cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise ArtifactError(
            "another audit is writing here", where=str(folder), fix="wait for it, or choose another --output"
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"cannot write here: {error.strerror}", where=str(folder.parent), fix="choose another --output"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else can hold this file now
        lock.release()
