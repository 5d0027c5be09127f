"""The result of an audit: typed, versioned, and enough to build the report again anywhere. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from robustkd.threat import ThreatModel

Level = Literal["baseline", "replay", "surrogate", "blackbox"]
CheckStatus = Literal["ok", "warn", "block", "skipped"]
Status = Literal["pass", "fail", "inconclusive", "invalid"]

#: exit code of each verdict (contract, section 2)
EXIT: dict[Status, int] = {"pass": 0, "fail": 10, "inconclusive": 11, "invalid": 12}


class Value(BaseModel):
    """A frozen part of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Value):
    """An estimate with the limits of its interval, all fractions."""

    estimate: float
    low: float
    high: float


class AttackResult(Value):
    """One attack's yield. Images already broken leave the queue, so the accuracy left falls from attack to attack."""

    level: Level
    robust_accuracy: float = Field(description="left of all n images after this attack and those before it")
    low: float
    high: float
    forward_calls: int = Field(description="images sent through the attacked side by this attack")
    seconds: float
    images: int = Field(0, description="images the attack was tried on")
    broken: int = Field(0, description="of these, images it broke")
    note: str = ""


class PerDraw(Value):
    """How often one answer of a random engine is right; the accuracies beside it are those of the majority of `draws`."""

    draws: int
    clean_accuracy: float
    robust_accuracy: float = Field(description="on the worst image found for each")


class Side(Value):
    """The engine, or the source model it is held against."""

    clean_accuracy: Interval
    robust_accuracy: Interval = Field(description="worst case per image over all attacks")
    robust_accuracy_float: Interval | None = Field(None, description="over the attacks that may use any value in [0, 1]")
    robust_accuracy_uint8: Interval | None = Field(None, description="over 8-bit images alone")
    attacks: dict[str, AttackResult] = {}
    per_draw: PerDraw | None = Field(None, description="of an engine that was declared random")


class Artifact(Value):
    """The file under audit and what ran it."""

    path: str
    sha256: str
    runtime: str
    runtime_version: str
    precision: str
    device: str
    settings: dict[str, Any] = {}
    size: int | None = Field(None, description="bytes of the file; none in results of earlier versions")


class Source(Value):
    """The checkpoint the artifact is held against."""

    path: str
    sha256: str


class Dataset(Value):
    """The images used."""

    name: str
    split: str
    n: int
    sha256: str


class Difference(Value):
    """Source minus engine, paired over the same images: positive is a loss in deployment."""

    clean: Interval
    robust: Interval
    mcnemar_p: float
    b: int = Field(description="source robust, engine broken")
    c: int = Field(description="engine robust, source broken")
    clean_b: int | None = Field(None, description="clean images that only the source gets right")
    clean_c: int | None = Field(None, description="clean images that only the engine gets right")


class KitUsed(Value):
    """The kit whose images an engine answered on a device."""

    path: str
    sha256: str
    made_on: str = Field(description="sha256 of the file that was attacked to make it")


class Check(Value):
    """A sanity check or a bound: what was seen, what was asked, and one plain sentence."""

    name: str
    status: CheckStatus
    observed: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    message: str = ""


class Corruption(Value):
    """Accuracies under one common corruption, at strengths 1 to 5; reported, never gated."""

    engine: tuple[float, ...] = ()
    source: tuple[float, ...] | None = None
    left_out: str = Field("", description="why there are none")


class EpsCurve(Value):
    """Images that survive an attack at several radii, of those right when clean; independent runs, not the verdict's."""

    attack: str
    images: int
    eps: tuple[float, ...]
    survive: tuple[float, ...]


class RadiusCurve(Value):
    """How far images stand: the smallest radius of a ladder at which each fell, of those right when clean.

    An image that fell at one radius counts as broken at all larger ones. No part in the verdict.
    """

    attack: str
    images: tuple[int, ...] = Field(description="positions in this audit")
    eps: tuple[float, ...]
    survive: tuple[float, ...]
    radius: tuple[float | None, ...] = Field(description="of each image; None where it stood at every radius")


class Landscape(Value):
    """The engine's loss around some images; `loss[image][row][column]`, rows along the gradient, None where not a number."""

    images: tuple[int, ...] = Field(description="positions in this audit")
    along: tuple[float, ...] = Field(description="the step in either direction, in units of the threat model")
    loss: tuple[tuple[tuple[float | None, ...], ...], ...]
    falling: float = Field(description="share of grid points from which the loss does not rise along the gradient")


class Timing(Value):
    """How long calls of one batch size took, after a warm-up: percentiles in milliseconds."""

    batch: int
    runs: int
    p50: float
    p95: float
    p99: float
    images_per_second: float


class Latency(Value):
    """How fast the engine was on the machine that audited it."""

    hardware: dict[str, Any] = Field(description="machine, cpu, cores, system; a GPU is the artifact's device")
    load_average: float | None = Field(None, description="of the machine, before: other work makes the figures worse")
    timings: tuple[Timing, ...]


class Verdict(Value):
    """The answer, and why."""

    status: Status
    reasons: tuple[str, ...]


class AuditResult(BaseModel):
    """The content of `result.json` (contract, section 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["robustkd.audit/1"] = Field("robustkd.audit/1", alias="schema")
    artifact: Artifact
    source: Source | None
    threat: ThreatModel
    dataset: Dataset
    policy: dict[str, Any]
    seed: int
    seconds: float
    engine: Side
    source_model: Side | None
    difference: Difference | None
    checks: tuple[Check, ...]
    verdict: Verdict
    corruptions: dict[str, Corruption] | None = Field(None, description="accuracies without an adversary, where asked for")
    eps_curve: EpsCurve | None = Field(None, description="the ladder of S6")
    radius_curve: RadiusCurve | None = Field(None, description="the same radii, warm-started: monotone for every image")
    landscape: Landscape | None = Field(None, description="the loss around some images, where asked for")
    latency: Latency | None = Field(None, description="of the engine, measured after its audit")
    kit: KitUsed | None = Field(None, description="the audit was done with a kit")

    def digests(self) -> dict[str, str]:
        """What the audit is about, by digest: artifact, dataset, policy with its bounds, and source and kit if any."""
        policy = hashlib.sha256(json.dumps(self.policy, sort_keys=True).encode()).hexdigest()
        found = {"artifact": self.artifact.sha256, "dataset": self.dataset.sha256, "policy": f"sha256:{policy}"}
        found |= {"source": self.source.sha256} if self.source else {}
        return found | ({"kit": self.kit.sha256} if self.kit else {})
