"""audit: AutoAttack and PGD-20 through our audit, against the AutoAttack package and a plain loop called directly.

One network (the robust teacher that ships), the same test images, threat and batch size; our audit runs the same attacks
on the network itself, without its sanity checks. `jobs-2` is the command line with --jobs 2 on a machine of two cores,
start and merging included; the package shares the cores in every operator, as torch does by itself.

Verdicts are compared image by image. The two sides draw other random numbers, so an image near the limit may fall on one
side only: such images are listed, each with what the other side's adversarial image does when it is judged anew.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.place import HERE, Place
from bench.reference import attacks
from bench.startup import ROOT
from bench.timing import Row, interleave
from robustkd.auditing.facts import ArtifactFacts
from robustkd.auditing.run import run_audit
from robustkd.datasets._base import ImageSet
from robustkd.datasets._open import open_dataset
from robustkd.engines.pytorch import PytorchEngine
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.recipe.schema import TeacherConfig
from robustkd.threat import ThreatModel
from robustkd.training.teachers import load_teachers
from robustkd.training.threads import cores

TEACHER, DATA, NAME = "fashion-mnist-resnet18", "fashion-mnist-10k", "resnet-18"
THREAT = ThreatModel()
BATCH = {"cpu": 50, "cuda": 500}

Flags = NDArray[np.bool_]
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Budget:
    """What is run: AutoAttack's parts, or PGD alone where `pgd` is not 0."""

    name: str
    steps: int = 0
    targets: int = 0
    fab: bool = False
    queries: int = 0
    pgd: int = 0

    @property
    def policy(self) -> Policy:
        """Ours: these attacks and nothing else."""
        return Policy(
            name=self.name,
            noise_draws=0,
            pgd_steps=self.pgd,
            apgd_steps=self.steps,
            targets=self.targets,
            fab=self.fab,
            square_queries=self.queries,
            uint8="none",
            ladder_images=0,
            effort_images=0,
            scale_images=0,
            memory_images=0,
            fresh_process=False,
        )


STANDARD = Budget("autoattack-standard", steps=100, targets=9, fab=True, queries=5000)
PGD = Budget("pgd-20", pgd=20)


@dataclass(frozen=True)
class Outcome:
    """Which images one side left standing, and its adversarial image of each."""

    robust: Flags
    x_adv: Images


def rows(*, quick: bool, place: Place = HERE) -> Iterator[Row]:
    """PGD-20, then the standard AutoAttack, the dear one; fewer images in a quick run, more on a GPU."""
    counts = {PGD: 64 if quick else 256, STANDARD: 16 if quick else 200}
    if place.device != "cpu":
        counts = {PGD: 1000, STANDARD: 200 if quick else 1000}
    for budget, n in counts.items():
        pairs = (1 if quick else 2) if budget is STANDARD else 3
        kinds = [Sides, Jobs] if budget is STANDARD and not quick and place.device == "cpu" and cores() > 1 else [Sides]
        for kind in kinds:
            if place.wants(kind.called(budget)):
                yield kind(budget, n, BATCH[place.device], place.device).row(pairs=pairs, settle=place.settle)


class Sides:
    """One budget on both sides."""

    def __init__(self, budget: Budget, n: int, batch: int, device: str = "cpu") -> None:
        self.budget, self.batch, self.name = budget, batch, self.called(budget)
        net, self.images = subject(n)
        self.net = net.to(device)
        self.direct = deepcopy(self.net).requires_grad_(True)  # as a script loads it
        self.x = torch.from_numpy(self.images.floats()).to(device)
        self.y = torch.from_numpy(self.images.labels).to(device)
        self.outcomes: dict[str, Outcome] = {}

    @staticmethod
    def called(budget: Budget) -> str:
        """The name of the case."""
        return f"{budget.name}/{NAME}"

    def ours(self) -> None:
        """Our audit."""
        engine = PytorchEngine(self.net, input_shape=self.images.shape, classes=len(self.images.classes))
        _, arrays = run_audit(
            engine,
            artifact=ArtifactFacts(TEACHER, "0" * 64),
            images=self.images,
            threat=THREAT,
            policy=self.budget.policy,
            audit=AuditConfig(batch_size=self.batch),
            twin=self.net,
        )
        self.outcomes["ours"] = Outcome(arrays.ledger.engine.robust(), arrays.ledger.worst)

    def reference(self) -> None:
        """The package, or the plain loop."""
        budget, limits = self.budget, {"eps": THREAT.eps, "batch": self.batch}
        if budget.pgd:
            x_adv = attacks.pgd(self.direct, self.x, self.y, steps=budget.pgd, **limits)  # type: ignore[arg-type]
        else:
            x_adv = attacks.autoattack(
                self.direct,
                self.x,
                self.y,
                steps=budget.steps,
                targets=budget.targets,
                fab=budget.fab,
                queries=budget.queries,
                **limits,  # type: ignore[arg-type]
            )
        found = x_adv.cpu().numpy()
        self.outcomes["reference"] = Outcome(self.robust_clean() & self._robust(found), found)

    def row(self, *, pairs: int, settle: Callable[[], object] = lambda: None) -> Row:
        """Time both sides in turns, and compare their verdicts."""
        timed = interleave(self.name, self.ours, self.reference, pairs=pairs, warm=0, settle=settle)
        return {**timed, "n": len(self.y), "batch": self.batch, **self.verdicts()}

    def verdicts(self) -> dict[str, Any]:
        """Robust images of both sides, and every image on which they differ."""
        ours, reference = self.outcomes["ours"], self.outcomes["reference"]
        differ = np.flatnonzero(ours.robust != reference.robust)
        return {
            "robust_ours": int(ours.robust.sum()),
            "robust_reference": int(reference.robust.sum()),
            "verdicts_equal": len(self.y) - len(differ),
            "differences": [self._explained(int(i), ours, reference) for i in differ],
        }

    def _explained(self, i: int, ours: Outcome, reference: Outcome) -> dict[str, Any]:
        breaker = "reference" if ours.robust[i] else "ours"
        images = (reference if breaker == "reference" else ours).x_adv[i : i + 1]
        margin = float(self._margins(images, slice(i, i + 1))[0])
        return {"image": i, "broken_by": breaker, "margin": margin, "why": _why(margin)}

    def robust_clean(self) -> Flags:
        """Which clean images the network gets right."""
        return self._robust(self.images.floats())

    def _robust(self, images: Images) -> Flags:
        """The package's rule: the label has the largest logit, or shares it as the first."""
        with torch.no_grad():
            flags: Flags = (self.direct(torch.from_numpy(images).to(self.y.device)).argmax(1) == self.y).cpu().numpy()
        return flags

    def _margins(self, images: Images, rows: slice) -> NDArray[np.float32]:
        with torch.no_grad():
            logits = self.direct(torch.from_numpy(images).to(self.y.device)).double()
        y = self.y[rows, None]
        rest = logits.scatter(1, y, float("-inf")).amax(1)
        margins: NDArray[np.float32] = (logits.gather(1, y).squeeze(1) - rest).cpu().numpy()
        return margins


class Jobs(Sides):
    """Our side is the command line, with a process for each core."""

    jobs = cores()

    @staticmethod
    def called(budget: Budget) -> str:
        """The name of the case."""
        return f"{Sides.called(budget)}/jobs-{Jobs.jobs}"

    def ours(self) -> None:
        """The audit of a user."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "policy.yaml").write_text(self.budget.policy.model_dump_json())  # JSON is YAML
            told = "--dataset", DATA, "--eps", THREAT.eps, "--min-robust", 1, "--batch-size", self.batch, "--jobs", self.jobs
            line = command(folder, len(self.y), "audit", *told)
            subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            kept = np.load(folder / "audit" / "adversarial.npz")
        if not np.array_equal(kept["x"], self.images.floats()):
            raise RuntimeError("the audit took other images than the reference")
        self.outcomes["ours"] = Outcome(self.robust_clean() & self._robust(kept["x_adv"]), kept["x_adv"])


def command(folder: Path, n: int, output: str, *more: object) -> list[str]:
    """The command line of an audit of the teacher that ships, under the policy that lies in a folder."""
    words = ["audit", f"teacher:{TEACHER}", "--policy", folder / "policy.yaml", "--n", n, "--output", folder / output, *more]
    return [sys.executable, "-m", "robustkd", *map(str, words)]


def subject(n: int) -> tuple[nn.Module, ImageSet]:
    """The teacher that ships, frozen and in eval mode, and n embedded test images: those that an audit with seed 0 takes."""
    images = open_dataset(DATA).load("test")
    nets, _ = load_teachers(
        (TeacherConfig(id=TEACHER),), channels=images.shape[0], classes=len(images.classes), device=torch.device("cpu")
    )
    net = nets["robust"].to(memory_format=torch.contiguous_format)
    return net, images.take(np.random.default_rng(0).permutation(len(images))[:n])


def _why(margin: float) -> str:
    """Of an image that one side broke, from the margin by which it breaks when it is judged anew."""
    if margin < 0:
        return "its search found an image that the other's did not"
    return "a tie, which we count as broken" if margin == 0 else "broken by the rounding of another layout only"
