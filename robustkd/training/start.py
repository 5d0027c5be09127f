"""The weights a student starts from: `student_init` of a recipe. They fit as a whole, or nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustkd.bundle import MANIFEST, Bundle
from robustkd.errors import ConfigError
from robustkd.models._base import ModelConfig
from robustkd.models._files import load_state, read_state
from robustkd.models._foreign import read_foreign
from robustkd.recipe.schema import StartConfig
from robustkd.training.published import published
from robustkd.training.sources import Listen, digest_of, locate, remember, remote

#: knobs of an architecture that say how it starts, not what it computes
_NOT_THE_NET = {"pretrained"}


@dataclass(frozen=True)
class Start:
    """Tensors under the keys of the bare student, the file they are from, and what the manifest says of it."""

    state: dict[str, Tensor]
    file: Path
    origin: dict[str, str]

    def into(self, net: nn.Module) -> None:
        """Load them.

        Raises:
            ArtifactError: a tensor is missing, left over or of another shape; each is named.
        """
        load_state(net, self.state, str(self.file))


def read_start(
    config: StartConfig,
    student: ModelConfig,
    *,
    root: Path | None,
    trust_pickle: bool = False,
    record: bool = True,
    listen: Listen = lambda event: None,
) -> Start:
    """Read the weights to start from.

    Args:
        config: the recipe's `student_init`.
        student: the recipe's student; a bundle must be of the same one.
        root: the data root, under which fetched files go.
        trust_pickle: unpickle in full where the recipe states the digest.
        record: write down the digest of a fetched file that is used for the first time.
        listen: called with the events of downloads.

    Raises:
        ArtifactError: the file is missing, damaged, no weights, or not the one described.
        ConfigError: the bundle is of another student, or the source is a whole network.
        RequirementError: the source needs a package that is not installed.
    """
    if published(config.path):
        raise ConfigError(
            f"{config.path} is a network, not weights of this student", where="student_init", fix="name a file or a bundle"
        )
    path = locate(config.path, root, digest=config.sha256, listen=listen)
    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path, kind="checkpoint")
        _same_student(bundle, student)
        file = bundle.file("model.safetensors")
        digest = digest_of(file, config.sha256, first=False)
        state = read_state(file)
    else:
        file = path
        digest = digest_of(file, config.sha256, first=remote(config.path))
        trusted = digest if trust_pickle and config.sha256 is not None else None
        state = read_foreign(file, prefix=config.prefix, rename=config.rename, trusted=trusted)
        if remote(config.path) and record and config.sha256 is None:
            remember(file, digest)
    return Start(state, file, {"source": config.path, "sha256": digest})


def _same_student(bundle: Bundle, student: ModelConfig) -> None:
    """Weights of a net that only computes otherwise (a stride, a normalisation) would fit, and be wrong."""
    was: dict[str, Any] = bundle.manifest.recipe.get("student") or {}
    now = student.model_dump(mode="json")
    for key in sorted({*was, *now} - _NOT_THE_NET):
        if was.get(key) != now.get(key):
            raise ConfigError(
                f"student_init is of another student: its {key} is {was.get(key)}, here it is {now.get(key)}",
                where=str(bundle.path),
                fix=f"set student.{key}; or name the file model.safetensors inside, whose shapes alone are checked",
            )
