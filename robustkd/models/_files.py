"""Networks from files: strict keys, safetensors only, nothing unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustkd.bundle import Bundle
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError
from robustkd.models._base import ModelConfig, bare


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        ArtifactError: the file is missing, damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {file.name}: {error.strerror}", where=str(file), fix="check the path") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{file.name} is not a whole .safetensors file: {error}",
            where=str(file),
            fix="copy it again; pickled checkpoints (.pt, .pth) are not read",
        ) from error


def load_state(net: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load strictly into the network behind its normalisation; a missing step counter of batch norm is no error.

    Raises:
        ArtifactError: a tensor is missing, left over, or of another shape.
    """
    target = bare(net)
    wanted = target.state_dict()
    lacking = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    for problem, keys in (
        ("lacks", lacking),
        ("has another shape for", shapes),
        ("has, unknown to the net,", surplus),
    ):
        if keys:
            raise ArtifactError(
                f"the file {problem} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else ""),
                where=where,
                fix="name the architecture the weights were trained with (model, width, classes, channels)",
            )
    target.load_state_dict({**wanted, **state})


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
