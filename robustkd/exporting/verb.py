"""The verb `export`: a checkpoint to one bundle per target, each held against the checkpoint on real images.

A board without torch exports too: an ONNX file or bundle becomes an engine there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from robustkd.bundle import MANIFEST, Bundle, newest_checkpoint
from robustkd.datasets._base import ImageSet, balanced
from robustkd.datasets._open import open_dataset
from robustkd.engines._base import Images
from robustkd.errors import ArtifactError
from robustkd.exporting.buildable import check_buildable
from robustkd.recipe.target import Target, read_target

DEFAULT_TARGET = "cpu-fp32"
PARITY_IMAGES = 256

_log = logging.getLogger(__name__)


def export(
    checkpoint: Path | str | None = None,
    *,
    targets: Sequence[str | Target] = (),
    output: Path | str | None = None,
    data: Path | str | None = None,
) -> list[Bundle]:
    """Export a checkpoint for each target into `output/<target>`.

    Args:
        checkpoint: a checkpoint bundle or the run it lies in; left out, the newest one under the runs folder. For engines also
            an onnx bundle or a bare .onnx file.
        targets: names, paths or profiles; left out, those of the checkpoint's recipe.
        output: the folder that receives one bundle per target; left out, the run's folder.
        data: data root, over the recipe's.

    Raises:
        ConfigError: a target profile is missing or wrong.
        RequirementError: a target cannot be built here; nothing has been built then.
        ArtifactError: the checkpoint or the data cannot be read, or the output cannot be written.
        NumericsError: an exported file does not compute what the checkpoint computes.
    """
    given, output, data = (None if path is None else Path(path) for path in (checkpoint, output, data))
    found = find_checkpoint(given)
    if is_graph(found):
        return _engines(found, targets, output, data)
    source = Bundle.open(found, kind="checkpoint")
    profiles = resolve(targets or targets_of(found))
    from robustkd.exporting.run import export_target

    images = parity_images(source, data).floats()
    home = source.path.resolve().parent if output is None else output
    return [export_target(source, target, home / target.name, images=images, data=data) for target in profiles]


def targets_of(checkpoint: Path) -> tuple[str, ...]:
    """The names of the targets in a checkpoint's recipe; the usual one where it names none, nothing for an ONNX file.

    Raises:
        ArtifactError: the folder is no checkpoint.
    """
    if is_graph(checkpoint):
        return ()
    recipe = Bundle.open(checkpoint, kind="checkpoint", check=False).manifest.recipe
    return tuple(recipe.get("targets") or (DEFAULT_TARGET,))


def is_graph(path: Path) -> bool:
    """Whether a path is an ONNX file or an onnx bundle, from which engines are built without torch."""
    from robustkd.exporting.trt.bundle import is_graph as asked

    return asked(path)


def _engines(path: Path, targets: Sequence[str | Target], output: Path | None, data: Path | None) -> list[Bundle]:
    from robustkd.exporting.trt.bundle import build_bundle

    if not targets:
        raise ArtifactError(
            "this is of kind onnx, not checkpoint: it can become an engine and nothing else",
            where=str(path),
            fix="give --trt, --rtx or the --target of an engine, or name a checkpoint",
        )
    return [build_bundle(path, target, output, images=_real_images(path, data)) for target in resolve(targets, str(path))]


def _real_images(path: Path, data: Path | None) -> Images | None:
    """Test images of the bundle's data set, where it has one and it is here: a board need not have it."""
    try:
        return parity_images(Bundle.open(path, kind="onnx", check=False), data).floats()
    except ArtifactError as error:
        _log.info("no test images: %s", error.what)
        return None


_GIVE = "give a checkpoint bundle, its run, or an .onnx file"


def find_checkpoint(given: Path | None) -> Path:
    """The checkpoint's folder: as given, around the file given, or inside the run given; an .onnx file is left as it is.

    Left out, it is the newest under ROBUSTKD_RUNS (./runs).

    Raises:
        ArtifactError: there is none.
    """
    if given is None:
        newest = newest_checkpoint(Path(os.environ.get("ROBUSTKD_RUNS", "runs")).expanduser())
        _log.info("the newest checkpoint is %s", newest)
        return newest
    if not given.exists():
        raise ArtifactError("there is no such checkpoint or file", where=str(given), fix=_GIVE)
    if given.is_file():
        if given.suffix not in (".onnx", ".safetensors") and given.name != MANIFEST:
            raise ArtifactError(f"{given.name} is no checkpoint", where=str(given), fix=_GIVE)
        return given if given.suffix == ".onnx" else given.parent
    inside = given / "checkpoint"
    return inside if (inside / MANIFEST).is_file() and not (given / MANIFEST).is_file() else given


def resolve(targets: Iterable[str | Target], place: str = "BUNDLE") -> list[Target]:
    """Read every profile and refuse what cannot be built, before any work; a target named twice is built once.

    Raises:
        ConfigError: a profile is missing or wrong.
        RequirementError: it cannot be built here.
    """
    profiles = {t.name: t for t in (t if isinstance(t, Target) else read_target(t) for t in targets)}
    for target in profiles.values():
        check_buildable(target, place)
    return list(profiles.values())


def parity_images(checkpoint: Bundle, data: Path | None = None, n: int = PARITY_IMAGES) -> ImageSet:
    """At most `n` test images of the checkpoint's own data set, balanced over the classes, always the same.

    Raises:
        ArtifactError: the manifest names no data set, its files are missing, or its images do not fit the model.
    """
    manifest = checkpoint.manifest
    spec = manifest.recipe.get("dataset")
    if spec is None:
        raise ArtifactError(
            "the manifest does not say what the model was trained on",
            where=str(checkpoint.path),
            fix="distill it again with this version",
        )
    images = open_dataset(spec, data).load("test")
    if images.note:
        _log.warning("%s", images.note)
    if manifest.model is not None and images.shape != manifest.model.input_shape:
        raise ArtifactError(
            f"the images of {images.name} are {images.shape}, the model takes {manifest.model.input_shape}",
            where=str(checkpoint.path),
            fix="point --data at the data set the checkpoint was trained on",
        )
    return images.take(balanced(images.labels, min(n, len(images)), seed=0))
