"""Networks from files: strict keys, safetensors only, nothing unpickled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustkd.bundle import Bundle
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError
from robustkd.models._base import ModelConfig, bare
from robustkd.models._constants import without_constants

NAMED = 8
"""How many tensors of a kind an error names."""
_MEND = "name the architecture the weights were trained with (model, width, classes, channels)"


def start_of(file: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise ArtifactError(f"cannot read {file.name}: {error.strerror}", where=str(file), fix="check the path") from error


def is_page(start: bytes) -> bool:
    """Whether a file that begins so is a web page, as a failed download leaves it."""
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<?xml"))


def refuse_page(file: Path) -> bytes:
    """The first bytes of a file that is no web page.

    Raises:
        ArtifactError: it is one, or cannot be read.
    """
    if is_page(start := start_of(file)):
        raise ArtifactError(
            f"{file.name} is a web page: the download failed",
            where=str(file),
            fix="open its address in a browser, and save the file",
        )
    return start


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        ArtifactError: the file is missing, damaged, a web page, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    refuse_page(file)
    try:
        return load(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {file.name}: {error.strerror}", where=str(file), fix="check the path") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{file.name} is not a whole .safetensors file: {error}",
            where=str(file),
            fix="copy it again; a pickled checkpoint keeps its own ending (.pt, .pth)",
        ) from error


def load_state(net: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load strictly into the network behind its normalisation; a missing step counter of batch norm is no error.

    Raises:
        ArtifactError: a tensor is missing, left over, or of another shape; each is named, and nothing is loaded. Or the
            file brings a mean and deviation along, and they are not those of the network.
    """
    target = bare(net)
    wanted = target.state_dict()
    state = without_constants(net, state, where)
    lacking = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    surplus = sorted(k for k in state if k not in wanted)  # a file gives its tensors in any order
    other = [(k, tuple(state[k].shape), tuple(wanted[k].shape)) for k in wanted if k in state]
    other = [(k, has, want) for k, has, want in other if has != want]
    problems = (
        ("lacks", lacking),
        ("has another shape for", [f"{k} ({_shape(has)}, not {_shape(want)})" for k, has, want in other]),
        ("has, unknown to the net,", surplus),
    )
    if said := [f"{problem} {_listed(keys)}" for problem, keys in problems if keys]:
        alone = not lacking and not surplus
        raise ArtifactError(f"the file {'; '.join(said)}", where=where, fix=(alone and _classes(other)) or _MEND)
    target.load_state_dict({**wanted, **state})


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _classes(other: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    """What to do where nothing but the rows of the last layer differ: then it is the number of classes."""
    rows = {(has[:1], want[:1]) for _, has, want in other if has[1:] == want[1:] and len(has) in (1, 2)}
    if len(other) > 2 or len(rows) != 1:
        return ""
    ((has,), (want,)) = rows.pop()
    return f"it is for {has} classes, not {want}: choose one of this data set"


def load_net(bundle: Bundle) -> nn.Module:
    """The student of a checkpoint bundle, in eval mode.

    Raises:
        ArtifactError: the bundle's model or weights do not fit.
    """
    info, student = bundle.manifest.model, bundle.manifest.recipe.get("student")
    if info is None or not isinstance(student, dict):
        raise ArtifactError(
            "the manifest does not say what the model is", where=str(bundle.path), fix="distill it again with this version"
        )
    config: ModelConfig = Shelf("models").get(student.get("name", "")).model_validate(student)
    net = config.build(channels=info.input_shape[0], classes=len(info.classes))
    file = bundle.file("model.safetensors")
    load_state(net, read_state(file), str(file))
    return net.eval()


def portable(net: nn.Module) -> dict[str, Any]:
    """The network's state as it is saved: contiguous, on the CPU, without its normalisation."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in bare(net).state_dict().items()}
