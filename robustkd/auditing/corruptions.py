"""Common corruptions, reported and never gated: what happens to images without an adversary.

Our own set in the spirit of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019; its figures are not those of CIFAR-10-C, though JPEG has the qualities of its code. Needs no
torch; JPEG needs Pillow.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from robustkd.auditing.sides import Side
from robustkd.catalog import needed
from robustkd.engines._base import Images
from robustkd.errors import RequirementError
from robustkd.result import Corruption

Corrupt = Callable[[Images, float, list[Generator]], NDArray[np.floating]]
STRENGTHS = 5


def _noise(x: Images, sigma: float, rngs: list[Generator]) -> NDArray[np.floating]:
    noisy: NDArray[np.floating] = x + sigma * np.stack([rng.standard_normal(x.shape[1:]) for rng in rngs])
    return noisy


def _shot(x: Images, photons: float, rngs: list[Generator]) -> NDArray[np.floating]:
    counts = np.stack([rng.poisson(photons * image) for rng, image in zip(rngs, x, strict=True)])
    seen: NDArray[np.floating] = counts / photons
    return seen


def _blur(x: Images, sigma: float, rngs: list[Generator]) -> NDArray[np.floating]:
    blurred: NDArray[np.floating] = gaussian_filter1d(gaussian_filter1d(x, sigma, axis=2), sigma, axis=3)
    return blurred


def _brightness(x: Images, more: float, rngs: list[Generator]) -> NDArray[np.floating]:
    brighter: NDArray[np.floating] = x + np.float32(more)
    return brighter


def _contrast(x: Images, factor: float, rngs: list[Generator]) -> NDArray[np.floating]:
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    flatter: NDArray[np.floating] = mean + np.float32(factor) * (x - mean)
    return flatter


def _pixelate(x: Images, share: float, rngs: list[Generator]) -> NDArray[np.floating]:
    """Blocks of their mean, `share` of the rows and columns many."""
    for axis in (2, 3):
        size = x.shape[axis]
        block = np.arange(size) * max(1, round(share * size)) // size
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        means = np.add.reduceat(x, starts, axis=axis) / np.bincount(block).reshape([-1 if a == axis else 1 for a in range(4)])
        x = np.take(means, block, axis=axis)
    return x


def _jpeg(x: Images, quality: float, rngs: list[Generator]) -> NDArray[np.floating]:
    """Written as JPEG and read back; Pillow chooses the sampling of colours, as it does for CIFAR-10-C."""
    pictures = _pillow()
    read = []
    for image in np.round(np.clip(x, 0, 1) * 255).astype(np.uint8):
        grey, file = len(image) == 1, io.BytesIO()
        picture = pictures.fromarray(image[0] if grey else np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture.save(file, "JPEG", quality=int(quality))
        pixels = np.asarray(pictures.open(file), np.uint8)
        read.append(pixels[None] if grey else pixels.transpose(2, 0, 1))
    back: NDArray[np.floating] = np.stack(read) / np.float32(255)
    return back


def _pillow() -> Any:
    return needed("PIL.Image", "JPEG is written by Pillow", fix="pip install 'robustkd[train]'")


#: what is done, and its parameter at each strength: standard deviation, photons, pixels, level, factor, share, quality
KINDS: dict[str, tuple[Corrupt, tuple[float, ...]]] = {
    "gaussian-noise": (_noise, (0.02, 0.04, 0.06, 0.08, 0.10)),
    "shot-noise": (_shot, (500, 250, 120, 80, 50)),
    "blur": (_blur, (0.4, 0.6, 0.8, 1.0, 1.2)),
    "brightness": (_brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": (_contrast, (0.75, 0.60, 0.45, 0.30, 0.15)),
    "pixelate": (_pixelate, (0.9, 0.75, 0.6, 0.5, 0.4)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
}


def obstacle(kind: str, channels: int) -> str:
    """Why a corruption is left out here; empty where it is not."""
    if kind != "jpeg":
        return ""
    if channels not in (1, 3):
        return f"JPEG knows images of 1 or 3 channels, these have {channels}"
    try:
        _pillow()
    except RequirementError as error:
        return f"{error.what}: {error.fix}"
    return ""


def corrupted(x: Images, kind: str, strength: int, seed: int) -> Images:
    """Images (n, C, H, W) after one corruption of strength 1 to 5; each has a random stream of its own."""
    act, parameters = KINDS[kind]
    name = zlib.crc32(kind.encode())
    rngs = [np.random.default_rng((seed, name, strength, i)) for i in range(len(x))]
    found: Images = np.clip(act(x, parameters[strength - 1], rngs), 0, 1).astype(np.float32)
    return found


def corruptions(engine: Side, source: Side | None, x: Images, y: NDArray[np.int64], seed: int) -> dict[str, Corruption]:
    """The accuracy on either side under every corruption, at strengths 1 to 5, or why one is left out."""
    found = {}
    for kind in KINDS:
        if why := obstacle(kind, x.shape[1]):
            found[kind] = Corruption(left_out=why)
            continue
        sides: tuple[list[float], list[float]] = ([], [])
        for strength in range(1, STRENGTHS + 1):
            images = corrupted(x, kind, strength, seed)
            for side, shares in zip((engine, source), sides, strict=True):
                if side is not None:
                    shares.append(float(side.judge(images, y).robust.mean()))
        found[kind] = Corruption(engine=tuple(sides[0]), source=tuple(sides[1]) if source is not None else None)
    return found
