"""One picture file as pixels, through Pillow; and torchvision's data sets, imported when needed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robustkd.catalog import needed
from robustkd.datasets._pixels import Pixels
from robustkd.errors import ArtifactError, RequirementError


def open_picture(file: Path, mode: Literal["RGB", "L"]) -> Any:
    """The picture, converted to RGB or grey.

    Raises:
        RequirementError: Pillow is missing.
        ArtifactError: the file is missing, damaged, no picture, or has more than 8 bits per channel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RequirementError(
            "picture files are read by Pillow, which does not import here",
            where=str(error),
            fix="pip install 'robustkd[train]', or store the images as .npz",
        ) from error
    try:
        with Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):  # convert() would clip these at 255 without a word
                raise ArtifactError(f"{file.name} has more than 8 bits per channel", where=str(file), fix="store it as 8 bit")
            return picture.convert(mode)
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{file.name} cannot be read as a picture: {error}", where=str(file), fix="replace it") from error


Change = Callable[[Any], Any]


def read_pixels(file: Path, mode: Literal["RGB", "L"], change: Change | None = None) -> Pixels:
    """One picture as (channels, H, W), after `change` of the Pillow image.

    Raises:
        RequirementError: Pillow is missing.
        ArtifactError: as in `open_picture`.
    """
    picture = open_picture(file, mode)
    pixels = np.asarray(picture if change is None else change(picture), np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def squeezed(size: int) -> Change:
    """The whole picture resized to a square of `size` pixels, bilinear."""
    return lambda picture: picture.resize((size, size), 2)  # Image.Resampling.BILINEAR


def centred(size: int) -> Change:
    """The shorter edge resized to `size`, and the centre kept."""
    v2 = _torchvision("transforms.v2", "pictures are resized")
    change: Change = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    return change


def torchvision_datasets(what: str) -> Any:
    """`torchvision.datasets`.

    Raises:
        RequirementError: torchvision does not import; `what` is said to need it.
    """
    return _torchvision("datasets", f"{what} is read")


def _torchvision(module: str, what: str) -> Any:
    fix = "pip install 'robustkd[train]', or store the images as .npz"
    return needed(f"torchvision.{module}", f"{what} by torchvision", fix=fix)
