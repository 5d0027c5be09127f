"""The images on which int8 ranges are measured: clean training images, or those images under attack."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustkd.bundle import Bundle
from robustkd.datasets._base import ImageSet, balanced
from robustkd.datasets._open import open_dataset
from robustkd.engines._base import Images
from robustkd.errors import ArtifactError, ConfigError
from robustkd.recipe.target import Calibration

_BATCH = 64
_log = logging.getLogger(__name__)


class Calibrated(NamedTuple):
    """Images (N, C, H, W) in [0, 1], and the record of where they come from."""

    images: Images
    record: dict[str, Any]


def calibration_images(checkpoint: Bundle, how: Calibration, *, data: Path | None = None, net: Any = None) -> Calibrated:
    """Choose the images by seed, balanced over the classes, and attack them where that is asked for.

    Args:
        checkpoint: its data set and threat model are meant where `how` names none.
        how: which images, how many, attacked or not.
        data: data root.
        net: the network to attack, images in [0, 1] to logits; needed for an attack only.

    Raises:
        ArtifactError: there are no such images, or they do not fit the model.
        ConfigError: an attack is asked for and the checkpoint has no threat model.
    """
    chosen, index = _choose(checkpoint, how, data)
    record: dict[str, Any] = {
        "data": chosen.name,
        "split": chosen.split,
        "n": len(chosen),
        "index_sha256": hashlib.sha256(index.astype("<i8").tobytes()).hexdigest(),
        "images_sha256": chosen.sha256,
        **how.model_dump(include={"method", "percentile", "seed"}),
        "attack": None,
    }
    if how.method == "minmax":
        del record["percentile"]
    if not how.attack:
        return Calibrated(chosen.floats(), record)
    attacked, record["attack"] = _attacked(checkpoint, chosen, net, how.seed)
    return Calibrated(attacked, record)


def _choose(checkpoint: Bundle, how: Calibration, data: Path | None) -> tuple[ImageSet, Any]:
    spec = how.data or checkpoint.manifest.recipe.get("dataset")
    if spec is None:
        raise ArtifactError(
            "the manifest does not say what the model was trained on",
            where=str(checkpoint.path),
            fix="name calibration images with --calib",
        )
    images = open_dataset(spec, data).load("train")
    if how.n > len(images):
        _log.warning("%s holds %d images; all are used for calibration", images.name, len(images))
    index = balanced(images.labels, min(how.n, len(images)), how.seed)
    info = checkpoint.manifest.model
    if info is not None and images.shape != info.input_shape:
        raise ArtifactError(
            f"calibration images have shape {images.shape}, the model takes {info.input_shape}",
            where=f"--calib {how.data or images.name}",
            fix="use images of the data set the model was trained on",
        )
    return images.take(index), index


def _attacked(checkpoint: Bundle, images: ImageSet, net: Any, seed: int) -> tuple[Images, dict[str, Any]]:
    import torch

    from robustkd.attacks.pgd import PGD

    threat, info = checkpoint.manifest.threat, checkpoint.manifest.model
    if threat is None:
        raise ConfigError(
            "the checkpoint does not say what it withstands, so its calibration images cannot be attacked",
            where="--calib-attack",
            fix="leave --calib-attack out",
        )
    if info is not None and int(images.labels.max()) >= len(info.classes):
        raise ArtifactError(
            f"a calibration image has label {int(images.labels.max())}, the model knows {len(info.classes)} classes",
            where=f"--calib {images.name}",
            fix="attack images of the data set the model was trained on",
        )
    attack, x, y = PGD(), torch.from_numpy(images.floats()), torch.from_numpy(images.labels)
    device = next((p.device for p in net.parameters()), x.device)
    found = [
        attack.perturb(net, x[i : i + _BATCH].to(device), y[i : i + _BATCH].to(device), threat, seed=seed + i)
        .x_adv.cpu()
        .numpy()
        for i in range(0, len(x), _BATCH)
    ]
    return np.concatenate(found), {**attack.model_dump(), **threat.model_dump()}
