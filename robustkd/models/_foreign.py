"""Weights as others publish them: .safetensors, or a pickled checkpoint read with PyTorch's weights-only loader.

The quirks are those of robust checkpoints (methods.md, section 8.3): a state dict on its own or under a key beside
optimiser and log, key prefixes of wrappers, and a download that left a web page in place of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from robustkd.errors import ArtifactError
from robustkd.models._files import read_state

#: keys under which a state dict is filed; `last` is that of two families of RobustBench
_FILED = ("state_dict", "last")
#: what wrappers put before every key, outermost first
WRAPPERS = ("module.", "model.")


def read_foreign(file: Path, *, prefix: str = "", rename: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under the keys of the network.

    Args:
        file: .safetensors, or what `torch.save` wrote. Nothing but tensors and plain values is unpickled.
        prefix: one more prefix to take off, before those of the usual wrappers; only where every key begins with it.
        rename: first parts of keys, `linear` -> `fc`; a key that does not begin with one of them stays.

    Raises:
        ArtifactError: the file is missing, damaged, a web page, holds other things than tensors, or no state dict.
    """
    state = read_state(file) if file.suffix == ".safetensors" else _state_dict(_unpickled(file), file)
    for before in (prefix, *WRAPPERS):
        if before and all(key.startswith(before) for key in state):
            state = {key.removeprefix(before): value for key, value in state.items()}
    return {_renamed(key, rename or {}): value for key, value in state.items()}


def _renamed(key: str, rename: Mapping[str, str]) -> str:
    first, dot, rest = key.partition(".")
    return f"{rename.get(first, first)}{dot}{rest}"


def _unpickled(file: Path) -> Any:
    import torch

    try:
        with file.open("rb") as stream:
            start = stream.read(256).lstrip().lower()
    except OSError as error:
        raise ArtifactError(f"cannot read {file.name}: {error.strerror}", where=str(file), fix="check the path") from error
    if start.startswith((b"<!doctype", b"<html")):
        raise ArtifactError(
            f"{file.name} is a web page: the download failed",
            where=str(file),
            fix="open its address in a browser, and save the file",
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the byte in question leads to
        said = str(error).partition("\n")[0]
        raise ArtifactError(
            f"{file.name} cannot be read as weights: {said or type(error).__name__}",
            where=str(file),
            fix="fetch it again; if it holds more than tensors, store its state dict as .safetensors",
        ) from error


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    for key in _FILED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    whole = isinstance(content, dict) and bool(content)
    if not whole or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ArtifactError(
            f"{file.name} holds no state dict",
            where=str(file),
            fix="give a file with a state dict, at the top or as state_dict",
        )
    return dict(content)
