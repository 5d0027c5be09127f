"""What hides behind rounding: one exported student, every way to its gradients, `python -m bench masking [SOURCE]`.

Each attack runs alone on every image that is right when clean; success is read off the file in ONNX Runtime. `naive` follows
the true derivative of the roundings, which is zero; the rows below it are how an audit gets past that. SOURCE is a run or
checkpoint; left out, the quickstart is trained first. Its files in fp32 and in both kinds of int8 are exported beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkd import api
from robustkd.attacks._base import Model, prepared
from robustkd.attacks._grid import on_grid
from robustkd.auditing.sides import Side, engine_side, source_side
from robustkd.auditing.twin import Surrogate, Values, tame
from robustkd.bundle import Bundle, hardware, versions
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet, balanced
from robustkd.datasets._open import open_dataset
from robustkd.engines.importer.load import import_onnx
from robustkd.exporting.verb import find_checkpoint
from robustkd.losses import cross_entropy
from robustkd.models._files import load_net
from robustkd.recipe.target import Target
from robustkd.stats import mcnemar_exact, wilson
from robustkd.threat import ThreatModel

RECIPE = "quickstart"
TARGETS = (
    Target(name="fp32"),
    Target(name="int8-trt", precision="int8"),
    Target(name="int8-ort-cpu", precision="int8", int8_profile="ort-cpu"),
)
WORST, EIGHT_BIT, CLEAN, NOISE = "worst case of all above", "the same, every image rounded to 8 bit", "clean", "random noise"
NAIVE = "naive: exact derivative of the roundings"
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Budget:
    """How hard the attacks try; the images are judged `batch` at a time."""

    n: int = 500
    seed: int = 0
    pgd: int = 20
    steps: int = 100
    targets: int = 9
    queries: int = 1000
    draws: int = 10
    batch: int = 125

    def attacks(self, *names: str) -> list[Any]:
        """Entries of the shelf with this budget."""
        knobs = {
            "noise": {"draws": self.draws},
            "pgd": {"steps": self.pgd},
            "apgd-ce": {"steps": self.steps},
            "apgd-t": {"steps": self.steps, "targets": self.targets},
            "square": {"queries": self.queries},
            "square-ties": {"queries": self.queries},
        }
        return [Shelf("attacks").get(name)(**knobs[name]) for name in names]


@dataclass
class Rows:
    """One file: the flags of each row, and how many clean-correct images have a gradient of nothing but zeros."""

    right: Flags
    robust: dict[str, Flags] = field(default_factory=dict)
    zero: dict[str, float] = field(default_factory=dict)


class Bench:
    """Source, images and threat, and the attacks on each file.

    Args:
        source: the checkpoint.
        threat: the ball.
        budget: how hard.
        say: told about every finished row.
    """

    def __init__(self, source: Bundle, threat: ThreatModel, budget: Budget, say: Callable[[str], None]) -> None:
        self.net: nn.Module = load_net(source).requires_grad_(False)
        whole = open_dataset(source.manifest.recipe["dataset"]).load("test")
        self.images: ImageSet = whole.take(balanced(whole.labels, min(budget.n, len(whole)), budget.seed))
        self.threat, self.budget, self.say = threat, budget, say
        self.x, self.y = torch.from_numpy(self.images.floats()), torch.from_numpy(self.images.labels)
        self.side = source_side(self.net, torch.device("cpu"), budget.batch)
        self._replayed: list[Tensor] | None = None

    def replayed(self) -> list[Tensor]:
        """Images made on the source alone, once for all files."""
        if self._replayed is None:
            self._replayed = self._made(self.net, "apgd-ce", "apgd-t")
        return self._replayed

    def source(self) -> Flags:
        """Which images the source itself withstands."""
        return self._left(self.side, self.replayed())

    def column(self, file: Path) -> Rows:
        """Every row of one file."""
        graph = import_onnx(file)
        with api.load_engine(file) as engine, prepared(graph):
            side, values = engine_side(engine, self.budget.batch), Values(engine)
            found = Rows(side.judge(self.x.numpy(), self.images.labels).robust)
            found.robust[CLEAN] = found.right
            tried: list[Tensor] = []
            for name, make in self._rows(values, graph, found):
                begun, images = time.perf_counter(), make()
                tried += images
                found.robust[name] = self._left(side, images)
                self.say(f"{file.parent.name}: {name}: {found.robust[name].mean():.1%}, {time.perf_counter() - begun:.0f} s")
            found.robust[WORST] = self._left(side, tried)
            found.robust[EIGHT_BIT] = self._left(side, [on_grid(z, self.x, self.threat) for z in [self.x, *tried]])
        return found

    def _rows(self, values: Values, graph: Any, found: Rows) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
        """Names and attacks, in the order of the table; the graph passes roundings as each row says while it runs."""
        made = self._made
        yield NOISE, lambda: made(values, "noise")
        for way, rounding in (
            (NAIVE, "exact"),
            ("own graph, masked", "masked"),
            ("own graph, pass-through", "pass-through"),
        ):
            graph.rounding = rounding
            found.zero[way] = self._zero(graph, found.right)
            yield f"{way}, PGD-{self.budget.pgd}", lambda: made(graph, "pgd")
            yield f"{way}, APGD-CE", lambda: made(graph, "apgd-ce")
        graph.rounding = "masked"
        yield "replay of the source's images, APGD-CE + APGD-T", self.replayed
        yield "surrogate, gradient of the source, APGD-CE + APGD-T", lambda: self._led(values, self.net)
        yield "surrogate, gradient of its own graph, APGD-CE + APGD-T", lambda: self._led(values, graph)
        yield f"Square of the authors, {self.budget.queries} queries", lambda: made(values, "square")
        if all(self.threat.norm in attack.norms for attack in self.budget.attacks("square-ties")):
            yield f"square-ties, {self.budget.queries} queries", lambda: made(values, "square-ties")

    def _led(self, values: Values, twin: nn.Module) -> list[Tensor]:
        surrogate: Surrogate = tame(values, twin, self.x[:256])
        return self._made(surrogate, "apgd-ce", "apgd-t")

    def _made(self, model: Model, *names: str) -> list[Tensor]:
        """One image for each clean image and attack: batch by batch, so that seeds do not hang on n."""
        cuts = range(0, len(self.x), self.budget.batch)
        return [torch.cat([self._part(model, attack, first) for first in cuts]) for attack in self.budget.attacks(*names)]

    def _part(self, model: Model, attack: Any, first: int) -> Tensor:
        rows = slice(first, first + self.budget.batch)
        x_adv: Tensor = attack.perturb(model, self.x[rows], self.y[rows], self.threat, seed=self.budget.seed + first).x_adv
        return x_adv

    def _left(self, side: Side, tried: list[Tensor]) -> Flags:
        """Right on the clean image and on every image tried."""
        flags = side.judge(self.x.numpy(), self.images.labels).robust
        for images in tried:
            flags &= side.judge(images.numpy(), self.images.labels).robust
        return flags

    def _zero(self, graph: nn.Module, right: Flags) -> float:
        """The share of clean-correct images whose cross entropy has a gradient of nothing but zeros."""
        count = 0
        for rows in np.array_split(np.flatnonzero(right), max(1, len(right) // self.budget.batch)):
            z = self.x[rows].clone().requires_grad_()
            (grad,) = torch.autograd.grad(cross_entropy(graph(z), self.y[rows]).sum(), z)
            count += int((grad.abs().flatten(1).amax(1) == 0).sum()) if len(rows) else 0
        return count / max(1, int(right.sum()))


def measured(source: Path, files: dict[str, Path], budget: Budget, eps: float | None, say: Callable[[str], None]) -> Any:
    """The whole result, ready for JSON: shares with their Wilson intervals."""
    bundle = Bundle.open(source, kind="checkpoint")
    threat = bundle.manifest.threat or ThreatModel()
    threat = threat if eps is None else threat.model_copy(update={"eps": eps})
    bench = Bench(bundle, threat, budget, say)
    return {
        "source": {"name": bundle.manifest.recipe.get("name"), "robust": _share(bench.source())},
        "threat": threat.model_dump(),
        "dataset": {"name": bench.images.name, "sha256": bench.images.sha256},
        "budget": {**vars(budget), "n": len(bench.images)},
        "files": {name: _told(bench.column(file)) for name, file in files.items()},
        "environment": {
            "hardware": hardware(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "load": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }


def _told(found: Rows) -> dict[str, Any]:
    worst = found.robust[WORST]
    naive = next(flags for name, flags in found.robust.items() if name.startswith(NAIVE) and name.endswith("CE"))
    hidden = int((naive & ~worst).sum())
    return {
        "rows": {name: _share(flags) for name, flags in found.robust.items()},
        "zero_gradients": found.zero,
        "hidden_from_naive": {"images": hidden, "mcnemar_p": mcnemar_exact(hidden, int((worst & ~naive).sum()))},
    }


def _share(flags: Flags) -> dict[str, float]:
    low, high = wilson(int(flags.sum()), len(flags))
    return {"estimate": float(flags.mean()), "low": low, "high": high}


def table(found: Any) -> str:
    """The rows in Markdown, in percent with Wilson intervals."""
    files = found["files"]
    lines = ["| robust accuracy | " + " | ".join(files) + " |", "|---" * (len(files) + 1) + "|"]
    first = next(iter(files.values()))
    for name in first["rows"]:
        cells = [_cell(told["rows"][name]) for told in files.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for way in first["zero_gradients"]:
        cells = [f"{100 * told['zero_gradients'][way]:.0f} %" for told in files.values()]
        lines.append(f"| zero gradients: {way.removeprefix('naive: ')} | " + " | ".join(cells) + " |")
    lines += ["", f"The source itself: {_cell(found['source']['robust'])} under the images replayed."]
    for name, told in files.items():
        hidden = told["hidden_from_naive"]
        lines.append(f"{name}: {hidden['images']} images fall that naive APGD-CE leaves, McNemar p {hidden['mcnemar_p']:.2g}.")
    return "\n".join(lines)


def _cell(share: dict[str, float]) -> str:
    return f"{100 * share['estimate']:.1f} ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench masking", description="Attacks on an int8 file, row by row.")
    parser.add_argument("source", nargs="?", type=Path, help=f"a run or checkpoint; left out, recipe {RECIPE} is trained")
    parser.add_argument("--file", action="append", type=Path, help="an ONNX file or bundle made of it; may be repeated")
    parser.add_argument("--eps", help="left out, that of the checkpoint; 8/255 or a decimal")
    for name, value in vars(Budget()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    eps = None if asked.eps is None else ThreatModel(eps=asked.eps).eps
    budget = Budget(**{name: getattr(asked, name) for name in vars(Budget())})
    with tempfile.TemporaryDirectory() as folder:
        source, files = _prepared(asked.source, asked.file or [], Path(folder))
        found = measured(source, files, budget, eps, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found) if asked.json else table(found))
    return 0


def _prepared(source: Path | None, given: list[Path], folder: Path) -> tuple[Path, dict[str, Path]]:
    """The checkpoint and the files to attack; what is not given is made in a folder."""
    checkpoint = api.distill(api.load_recipe(RECIPE), folder / RECIPE).path if source is None else find_checkpoint(source)
    if given:
        return checkpoint, {_called(path): _file(path) for path in given}
    bundles = api.export(checkpoint, targets=TARGETS, output=folder)
    return checkpoint, {bundle.path.name: bundle.file(".onnx") for bundle in bundles}


def _called(path: Path) -> str:
    return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"


def _file(path: Path) -> Path:
    return Bundle.open(path).file(".onnx") if path.is_dir() else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
