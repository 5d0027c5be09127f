"""`python -m bench.memory [--images N] [--size PIXELS] [--json]`: memory of loading a folder of pictures and of one epoch.

Each case runs in a process of its own: the training split is loaded, divided, and one epoch of augmented batches is drawn on
the CPU. `ratio` is the peak of that process above where it stood after its imports, over the size of all pixels: 1 holds each
image once. `twice` is a control that stacks a list of decoded pictures, as is easily written; it shows that the measurement
sees a second copy. Streaming reads in the measured process itself, without workers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.__main__ import RESULTS, environment, write
from bench.startup import ROOT

CASES = ("held", "streamed", "twice")
BATCH = 32
"""Images of a batch: as floats and while they are cropped these are held too, whatever the size of the set."""
MIB = 2**20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Peak memory over the size of all pixels.")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=96, help="width and height of each picture, in pixels")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.case:
        print(json.dumps(peak(asked.case, asked.folder)))
        return 0
    found = {"rows": rows(asked.images, asked.size), "environment": environment(quick=False)}
    write(RESULTS / "memory-folder.json", found)
    print(json.dumps(found) if asked.json else table(found))
    return 0


def rows(images: int, size: int) -> list[dict[str, Any]]:
    """Every case on the same pictures, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), images, size)
        return [_measured(case, Path(name)) for case in CASES]


def make(folder: Path, images: int, size: int) -> None:
    """JPEG files of two classes under `folder`/train: noise of 8x8 patches, enlarged."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "train" / label).mkdir(parents=True)
    for i in range(images):
        patches = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(patches).resize((size, size)).save(folder / "train" / "ab"[i % 2] / f"{i:06}.jpg")


def _measured(case: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory", "--case", case, "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def peak(case: str, folder: Path) -> dict[str, Any]:
    """One case in this process, which has held no picture before."""
    recipe = _recipe(case, folder)
    _warm()
    before = now()
    pixels = _epoch(recipe) if case != "twice" else _twice(recipe)
    added = most() - before
    return {"case": case, "pixels_mib": pixels / MIB, "added_mib": added / MIB, "ratio": added / pixels}


def _recipe(case: str, folder: Path) -> Any:
    from robustkd.recipe.schema import Recipe

    stream = "always" if case == "streamed" else "never"
    return Recipe.model_validate(
        {
            "dataset": {"name": "folder", "path": str(folder), "holdout": 0, "stream": stream, "workers": 0},
            "student": "resnet18",
            "method": "pgd-at",
            "train": {"batch_size": BATCH},
        }
    )


def _epoch(recipe: Any) -> int:
    """Load, divide, and draw every batch of an epoch; the bytes of all pixels."""
    import torch

    from robustkd.training.batches import Batches, Place, divide

    train, _ = divide(recipe.dataset.load("train"), recipe)
    place = Place(0, 1, torch.device("cpu"))
    data = recipe.dataset
    batches = Batches(train, recipe.train, seed=0, place=place, stream=data.stream, workers=data.workers)
    seen = sum(len(x) for _, x, _ in batches.epoch(0))
    if seen != len(train):
        raise RuntimeError(f"{seen} images of {len(train)}")
    return int(train.images.nbytes)


def _twice(recipe: Any) -> int:
    """A list of pictures and the array made of them, for a moment both."""
    streamed = recipe.dataset.model_copy(update={"stream": "always"}).load("train")
    return int(np.stack(list(streamed.images)).nbytes)


def _warm() -> None:
    """Import and start everything once, on four pictures, so that only pixels are counted."""
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), 4, 32)
        for case in ("held", "streamed"):
            _epoch(_recipe(case, Path(name)))


def now() -> int:
    """Bytes of this process in memory; the peak begins anew where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return most()


def most() -> int:
    """The largest number of bytes that this process has had in memory."""
    try:
        return _status("VmHWM")
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {name}")


def table(found: dict[str, Any]) -> str:
    """The rows for people."""
    where = found["environment"]
    lines = [f"{where['hardware']['cpu']}, torch {where['versions'].get('torch')}; 1: each image once"]
    for row in found["rows"]:
        sizes = f"{row['added_mib']:7.0f} MiB above the start, pixels {row['pixels_mib']:7.0f} MiB"
        lines.append(f"{row['case']:10s} {row['ratio']:5.2f}   {sizes}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
