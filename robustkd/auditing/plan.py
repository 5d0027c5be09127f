"""Which attacks a policy asks for, in which order, against which model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from robustkd.attacks._base import Attack
from robustkd.auditing.probes import Kind
from robustkd.auditing.summary import EIGHT_BIT
from robustkd.catalog import Shelf
from robustkd.recipe.policy import Policy
from robustkd.result import Level

#: what an attack works on: the engine with gradients of the twin, the engine with those of a second twin, the source
#: alone, the engine's outputs alone, or the images that the other attacks found
Against = Literal["surrogate", "twin", "source", "engine", "pool"]


@dataclass(frozen=True)
class Step:
    """One attack of an audit under the name it has in the result; none where the images of the others are rounded.

    `images` limits it to the first so many that are right when clean; 0: no limit.
    """

    name: str
    level: Level
    against: Against
    attack: Attack | None
    images: int = 0

    @property
    def grid(self) -> bool:
        """Whether all its images are 8-bit images."""
        return self.attack is None or self.attack.grid


def plan(
    policy: Policy,
    *,
    twin: bool,
    source: bool,
    second: bool = False,
    kind: Kind = "logits",
    coarse: bool = False,
    norm: str = "linf",
) -> list[Step]:
    """The steps in order: baseline, surrogate, replay, black box, 8 bit. Without a twin only what needs no gradient.

    Args:
        policy: what is asked for.
        twin: gradients can be had (of the source, or of the artifact itself).
        source: there is another model to hold the engine against.
        second: gradients can be had of the engine's own graph as well.
        kind: what the engine returns; labels alone are met by an attack that needs no more.
        coarse: the engine's outputs are so few values that they tie and stand still, as those of an int8 engine do.
        norm: of the threat.
    """
    steps = []
    if policy.noise_draws:
        steps.append(_step("noise", "baseline", "engine", draws=policy.noise_draws))
    if twin:
        if policy.pgd_steps:
            steps.append(_step("pgd", "surrogate", "surrogate", steps=policy.pgd_steps))
        steps += [_step(name, "surrogate", "surrogate", **knobs) for name, knobs in _auto(policy, fab=not source)]
    if second:
        steps += [_step(name, "surrogate", "twin", **knobs) for name, knobs in _auto(policy, fab=False)]
    if source:
        steps += [_step(name, "replay", "source", **knobs) for name, knobs in _auto(policy, fab=True)]
    if policy.square_queries:
        steps.append(_step("square", "blackbox", "engine", queries=policy.square_queries))
    if coarse and policy.square_ties_queries:
        steps.append(_step("square-ties", "blackbox", "engine", queries=policy.square_ties_queries))
    steps += _decisions(policy, kind, norm)
    if policy.uint8 != "none":
        steps.append(Step(EIGHT_BIT[0], "blackbox", "pool", None))
    if policy.uint8 == "native" and twin and policy.apgd_steps:
        steps.append(_step(EIGHT_BIT[1], "surrogate", "surrogate", steps=policy.apgd_steps, restarts=policy.restarts))
    return steps


def reads_labels(policy: Policy, norm: str) -> bool:
    """Whether an attack that reads labels alone runs against an engine that returns no more."""
    return any(step.attack and norm in step.attack.norms for step in _decisions(policy, "labels", norm))


def _decisions(policy: Policy, kind: Kind, norm: str) -> list[Step]:
    """The attacks that read labels alone; an engine that returns no more meets them with every image."""
    alone = kind == "labels"
    images, steps = 0 if alone else policy.decision_images, []
    if policy.rays_queries and (policy.rays_always or alone):
        steps.append(_step("rays", "blackbox", "engine", queries=policy.rays_queries))
    if policy.hopskipjump_queries and (policy.hopskipjump_always or (alone and norm == "l2")):
        steps.append(_step("hopskipjump", "blackbox", "engine", queries=policy.hopskipjump_queries))
    return [replace(step, images=images) for step in steps]


def _auto(policy: Policy, *, fab: bool) -> list[tuple[str, dict[str, int]]]:
    """The gradient part of AutoAttack as far as the policy asks for it."""
    steps, restarts = policy.apgd_steps, policy.restarts
    found: list[tuple[str, dict[str, int]]] = []
    if steps:
        found.append(("apgd-ce", {"steps": steps, "restarts": restarts}))
        if policy.targets:
            found.append(("apgd-t", {"steps": steps, "restarts": restarts, "targets": policy.targets}))
    if policy.fab and fab:
        found.append(("fab-t", {"steps": 100, "targets": max(1, policy.targets)}))
    return found


def _step(name: str, level: Level, against: Against, **knobs: int) -> Step:
    attack: Attack = Shelf("attacks").get(name)(**knobs)
    prefix = {"source": "replay:", "twin": "twin:"}.get(against, "")
    return Step(f"{prefix}{name}", level, against, attack)


def seed_of(seed: int, name: str, chunk: int) -> int:
    """The seed of one chunk of one attack, so that an audit continues exactly where it stopped."""
    state = np.random.SeedSequence((seed, zlib.crc32(name.encode()), chunk)).generate_state(1, np.uint32)
    return int(state[0])
