"""One picture file as pixels, through Pillow."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

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
