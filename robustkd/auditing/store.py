"""What an unfinished audit keeps: each finished piece, whole or not at all, and the identity it belongs to."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkd.bundle import write_atomic, write_json
from robustkd.errors import ArtifactError

Arrays = dict[str, NDArray[Any]]
IDENTITY = "identity.json"


def partial_folder(folder: Path) -> Path:
    """Where the unfinished audit of `folder` lives: beside it, so that the bundle itself appears in one piece."""
    return folder.parent / f".{folder.name}.partial"


class Store:
    """Pieces by name; without a folder they live in memory only."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self._folder, self._identity, self._memory = folder, identity, dict[str, Arrays]()

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, Any], *, resume: bool) -> Store:
        """Start anew, or take up what an interrupted audit of the same identity left.

        Nothing is written before the first piece is finished, so an audit that never began leaves nothing.

        Raises:
            ArtifactError: there is an unfinished audit and `resume` is not asked for, or it is another one.
        """
        wanted = json.loads(json.dumps(identity))
        if folder is not None and (folder / IDENTITY).is_file():
            _compare(folder / IDENTITY, wanted, resume=resume)
        return cls(folder, wanted)

    def get(self, name: str) -> Arrays | None:
        """A finished piece, or None."""
        if self._folder is None:
            return self._memory.get(name)
        file = self._folder / f"{name}.npz"
        if not file.is_file():
            return None
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                "a piece of the interrupted audit is damaged", where=str(file), fix="delete this file and resume again"
            ) from error

    def put(self, name: str, arrays: Arrays) -> None:
        """Keep a finished piece; it is there whole or not at all."""
        if self._folder is None:
            self._memory[name] = arrays
            return
        self._begin(self._folder)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub mistakes ** for allow_pickle
        write_atomic(self._folder / f"{name}.npz", buffer.getvalue())

    def _begin(self, folder: Path) -> None:
        if (folder / IDENTITY).is_file():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot write here: {error.strerror}", where=str(folder.parent), fix="choose another --output"
            ) from error
        write_json(folder / IDENTITY, self._identity)

    def remove(self) -> None:
        """Forget everything: the audit is finished and written."""
        self._memory.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _compare(file: Path, wanted: dict[str, Any], *, resume: bool) -> None:
    if not resume:
        raise ArtifactError(
            "an unfinished audit is here", where=str(file.parent), fix="continue it with --resume, or delete that folder"
        )
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
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one audit at a time.

    Raises:
        ArtifactError: another process holds it, or the place cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
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
