"""How an audit is done and what its verdict asks for. Needs no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Level = Literal["baseline", "replay", "surrogate", "blackbox"]


class Gates(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What the verdict asks for, all of it; options of the command line override a policy's gates."""

    clean_drop: float | None = Field(None, ge=0, le=100, description="allowed drop of clean accuracy, percentage points")
    robust_drop: float | None = Field(None, ge=0, le=100, description="allowed drop of robust accuracy, percentage points")
    min_clean: float | None = Field(None, ge=0, le=100, description="floor of clean accuracy, percent")
    min_robust: float | None = Field(None, ge=0, le=100, description="floor of robust accuracy, percent")
    latency_p95_ms: float | None = Field(None, gt=0, description="milliseconds of a batch, 95th percentile on this machine")
    latency_batch: int = Field(1, ge=1, description="images in the batch of the latency gate")


class Policy(BaseModel, frozen=True, extra="forbid"):
    """Which attacks run and how hard; shipped as quick, standard and full."""

    name: str = "quick"
    noise_draws: int = Field(10, ge=0, description="random draws of the baseline")
    pgd_steps: int = Field(10, ge=0, description="steps of the PGD sanity line")
    apgd_steps: int = Field(100, ge=0, description="iterations of APGD-CE and of each APGD-T target")
    restarts: int = Field(1, ge=1, description="random restarts of APGD-CE and of each APGD-T target")
    targets: int = Field(9, ge=0, description="targets of APGD-T, capped at classes - 1; 0 leaves it out")
    twins: int = Field(
        1, ge=1, le=2, description="gradients for a quantised engine with a source: 1 the source's, 2 its own graph's as well"
    )
    fab: bool = Field(False, description="run FAB-T on the source and replay it, as the standard AutoAttack does")
    square_queries: int = Field(1000, ge=0, description="queries of Square on the engine; 0 leaves it out")
    square_ties_queries: int = Field(
        0, ge=0, description="queries of our own Square, for engines of quantised outputs, which tie; 0 leaves it out"
    )
    rays_queries: int = Field(0, ge=0, description="queries of RayS, which reads labels alone; 0 leaves it out")
    rays_always: bool = Field(False, description="run RayS on every engine, not only on those that return labels")
    hopskipjump_queries: int = Field(
        0,
        ge=0,
        description="queries of HopSkipJump, which reads labels alone, for L2 where engines return labels; 0 leaves it out",
    )
    hopskipjump_always: bool = Field(False, description="run HopSkipJump on every engine and in both norms")
    decision_images: int = Field(
        0,
        ge=0,
        description="RayS and HopSkipJump look at the first so many images that are right when clean; 0: at all, as always "
        "where the engine returns labels alone",
    )
    uint8: Literal["none", "post", "native"] = Field(
        "post", description="also judge 8-bit images: those of the other attacks rounded, or native attacks on the grid too"
    )
    ladder_images: int = Field(32, ge=0, description="images of S6, PGD at 1/4 to 4 eps; 0 leaves it out")
    effort_images: int = Field(0, ge=0, description="images of S8, APGD with more steps and restarts; 0 leaves it out")
    effort_steps: int = Field(100, ge=1, description="steps of S8, held against a fifth and five times as many")
    scale_images: int = Field(32, ge=0, description="images of S14, PGD on logits ten times as large; 0 leaves it out")
    memory_images: int = Field(32, ge=0, description="mirrored and unseen images of S16 that are attacked as well")
    fresh_process: bool = Field(True, description="S18 judges all images again in a fresh process too")

    landscape_images: int = Field(0, ge=0, description="images whose loss is drawn in the report; 0 leaves the plot out")
    corruptions: bool = Field(False, description="also report accuracies under common corruptions")
    gates: Gates = Field(Gates(), description="what the verdict asks for")

    @property
    def answers(self) -> int:
        """The most answers without a gradient that one attack asks for, per image."""
        fab = 100 * self.targets if self.fab else 0
        return max(fab, self.square_queries, self.square_ties_queries, self.rays_queries, self.hopskipjump_queries)


class AuditConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The audit section of a recipe; command-line options override it."""

    policy: str = Field("quick", description="a shipped policy or a path to a YAML file")
    n: int = Field(200, ge=1, description="test images, the first n in a seeded order")
    tolerance: float = Field(1.0, ge=0, le=100, description="allowed drop against the source, in percentage points")
    min_robust: float | None = Field(None, ge=0, le=100, description="floor of robust accuracy, percent")
    min_clean: float | None = Field(None, ge=0, le=100, description="floor of clean accuracy, percent")
    batch_size: int = Field(128, ge=1)
    stochastic: bool = Field(False, description="the engine is random on purpose: judge it by the majority of 16 draws")


def gates_of(gates: Gates, audit: AuditConfig) -> Gates:
    """The gates in force: those of a policy, overridden by what was set beside it; a drop always has a bound."""
    tolerance = audit.tolerance if "tolerance" in audit.model_fields_set else None
    found = {
        "clean_drop": _first(tolerance, gates.clean_drop, audit.tolerance),
        "robust_drop": _first(tolerance, gates.robust_drop, audit.tolerance),
        "min_clean": _first(audit.min_clean, gates.min_clean),
        "min_robust": _first(audit.min_robust, gates.min_robust),
    }
    return gates.model_copy(update=found)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def bounds_told(gates: Gates, audit: AuditConfig) -> dict[str, Any]:
    """The bounds as a result holds them: the options, and the gates that came out of them and of the policy."""
    return {**audit.model_dump(exclude={"policy", "n"}), "gates": gates_of(gates, audit).model_dump(exclude_none=True)}


def read_policy(name: str) -> Policy:
    """A policy by shipped name or path.

    Raises:
        ConfigError: there is no such policy, or a key or a value is wrong.
    """
    from robustkd.recipe.reading import read, validate  # reading knows recipes, and recipes know this module

    return validate(Policy, read("policy", name))
