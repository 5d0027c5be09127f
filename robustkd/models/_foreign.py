"""Weights as others publish them: .safetensors, or a pickled checkpoint read with PyTorch's weights-only loader.

The quirks are those of robust checkpoints (methods.md, section 8.3): a state dict on its own or under a key beside
optimiser and log, key prefixes of wrappers, and a download that left a web page in place of the file.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustkd.errors import ArtifactError
from robustkd.models._files import read_state, refuse_page

#: keys under which a state dict is filed; `last` is that of two families of RobustBench
_FILED = ("state_dict", "last", "model_state_dict", "model", "net", "student")
#: what wrappers put before every key, each taken off as often as it is there: parallel, normalised and compiled networks
WRAPPERS = ("module.", "model.", "_orig_mod.", "net.")


def read_foreign(
    file: Path, *, prefix: str = "", rename: Mapping[str, str] | None = None, trusted: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under the keys of the network.

    Args:
        file: .safetensors, or what `torch.save` wrote. Nothing but tensors and plain values is unpickled.
        prefix: one more prefix to take off, before those of the usual wrappers; only where every key begins with it.
        rename: first parts of keys, `linear` -> `fc`; a key that does not begin with one of them stays.
        trusted: the digest (`sha256:...`) of a file that may run code when it is unpickled; no other file may.

    Raises:
        ArtifactError: the file is missing, damaged, a web page, holds other things than tensors, or no state dict.
    """
    start = refuse_page(file)
    # the header of .safetensors follows its length; a file fetched from an address may have no ending
    safe = file.suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith((b"PK", b"\x80")))
    state = read_state(file) if safe else _state_dict(_unpickled(file, trusted), file)
    state = _unwrapped(_without(prefix, state))
    return {_renamed(key, rename or {}): value for key, value in state.items()}


def _without(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not prefix or not state or not all(key.startswith(prefix) for key in state):
        return state
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if (inner := _without(wrapper, state)) is not state:
            return _unwrapped(inner)
    return state


def _renamed(key: str, rename: Mapping[str, str]) -> str:
    first, dot, rest = key.partition(".")
    return f"{rename.get(first, first)}{dot}{rest}"


def _unpickled(file: Path, trusted: str | None) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the byte in question leads to
        if not _asks_for_more(error):
            said = str(error).partition("\n")[0]
            raise ArtifactError(
                f"{file.name} cannot be read as weights: {said or type(error).__name__}",
                where=str(file),
                fix="fetch it again: it is damaged, cut off, or no checkpoint",
            ) from error
        if trusted is None:
            raise ArtifactError(
                f"{file.name} holds more than weights: opening it would run code that it brings",
                where=str(file),
                fix="get it as .safetensors; if you trust it, state its sha256 and add --trust-pickle",
            ) from error
    return _run(file, trusted)


def _asks_for_more(error: Exception) -> bool:
    """Whether the weights-only loader met a class or function it does not allow, rather than damage."""
    said = str(error)
    return isinstance(error, pickle.UnpicklingError) and any(
        phrase in said
        for phrase in ("GLOBAL ", "Can only create new object for", "Can only build Tensor", "Trying to call reduce for")
    )


def _run(file: Path, trusted: str) -> Any:
    """Unpickle in full: the bytes that were digested are those that are read."""
    import torch

    data = file.read_bytes()
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != trusted:
        raise ArtifactError(f"{file.name} is not the file described: its digest differs", where=str(file), fix="fetch it again")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:  # as above; and its code may raise anything
        raise ArtifactError(
            f"{file.name} cannot be unpickled: {str(error) or type(error).__name__}",
            where=str(file),
            fix="install what it was saved with, or get it as .safetensors",
        ) from error
    return content.state_dict() if isinstance(content, nn.Module) else content


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    for key in _FILED:
        if isinstance(content, dict) and isinstance(content.get(key), dict | nn.Module):
            content = content[key]
    content = content.state_dict() if isinstance(content, nn.Module) else content
    whole = isinstance(content, dict) and bool(content)
    if not whole or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ArtifactError(
            f"{file.name} holds no state dict",
            where=str(file),
            fix="give a file with a state dict, at the top or as state_dict",
        )
    return dict(content)
