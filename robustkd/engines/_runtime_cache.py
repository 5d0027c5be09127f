"""What TensorRT-RTX compiled for this GPU, kept between processes: without it every start compiles all kernels anew.

It lies in the user's cache folder under the digest of the plan, not beside the engine: a bundle vouches for its files,
and would not for this one, which runs on the GPU. The library checks the content itself and rejects what was made by
another version, driver, system or GPU. Set ROBUSTKD_RTX_CACHE to another folder, or to nothing for no cache.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from robustkd.bundle import sha256, write_atomic
from robustkd.errors import ArtifactError


def cache_file(plan: Path) -> Path | None:
    """Where the kernels of a plan are kept; None where no cache is wanted."""
    given = os.environ.get("ROBUSTKD_RTX_CACHE")
    if given is not None:
        folder = Path(given).expanduser() if given else None
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustkd" / "rtx"
    return folder / f"{sha256(plan).removeprefix('sha256:')}.cache" if folder else None


class RuntimeCache:
    """The cache of one engine: loaded into its runtime configuration, and written when there is more in it.

    Args:
        config: the engine's runtime configuration.
        file: where the cache is kept; None for none.
    """

    def __init__(self, config: Any, file: Path | None) -> None:
        self._file, self._held = file, b""
        self._cache = config.create_runtime_cache() if file is not None else None
        if self._cache is None or file is None:
            return
        with suppress(OSError):
            self._held = file.read_bytes()
        if self._held and not self._cache.deserialize(self._held):
            self._held = b""  # of another GPU, driver or version: what is compiled now replaces it
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep what was compiled; a folder that cannot be written only costs time at the next start."""
        if self._cache is None or self._file is None:
            return
        compiled = self._cache.serialize()
        data = bytes(compiled) if compiled is not None else b""
        if data and data != self._held:
            with suppress(OSError, ArtifactError):
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_atomic(self._file, data)
                self._held = data
