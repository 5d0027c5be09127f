"""Figures of a network: clean, FGSM and PGD on the device, and AutoAttack by `robustkd audit`, which resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._methods_run import answered, survivors
from bench.gpu.common import HERE, Clock
from robustkd.bundle import Bundle, sha256
from robustkd.catalog import Shelf
from robustkd.datasets._open import open_dataset
from robustkd.engines.pytorch import chosen, full_products
from robustkd.models._files import load_net
from robustkd.recipe.policy import read_policy
from robustkd.result import AuditResult
from robustkd.stats import wilson
from robustkd.threat import ThreatModel

PGD = (10, 20)
AUTOATTACK, QUICK = HERE / "autoattack.yaml", HERE / "quick.yaml"


def figures(checkpoint: Path, data: dict[str, Any], n: int, *, attack: bool = True) -> dict[str, Any]:
    """Clean accuracy, and under FGSM and PGD-10 and -20, of the first `n` test images; with 95 % intervals of Wilson.

    PGD has steps of eps/4 from a random point and counts an image broken where any of its steps does; papers count the last.

    Args:
        checkpoint: the bundle.
        data: the section `dataset` of a recipe.
        n: at most as many test images as there are.
        attack: False for a clean network: only clean images.
    """
    bundle, device = Bundle.open(checkpoint, kind="checkpoint"), chosen("auto")
    images = open_dataset(data).load("test")
    part = images.take(np.arange(min(n, len(images))))
    with full_products():
        net = load_net(bundle).to(device).requires_grad_(False)
        x, y = (torch.from_numpy(values).to(device) for values in (part.floats(), part.labels))
        right = answered(net, x, y)
        found = {"clean": right}
        threat = bundle.manifest.threat
        if attack and threat is not None:
            found["fgsm"] = right & answered(net, fgsm(net, x, y, threat), y)
            for steps in PGD:
                found[f"pgd{steps}"] = right & survivors("pgd", {"steps": steps}, net, x, y, threat)
    told: dict[str, Any] = {name: interval(int(flags.sum()), len(part)) for name, flags in found.items()}
    return {"n": len(part), "device": str(device), "sha256": sha256(bundle.file("model.safetensors")), **told}


def fgsm(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel, batch: int = 500) -> torch.Tensor:
    """One step of length eps from the image itself (Goodfellow et al., ICLR 2015): PGD of the shelf with these knobs."""
    attack = Shelf("attacks").get("pgd")(steps=1, step=1.0)
    parts = [slice(first, first + batch) for first in range(0, len(x), batch)]
    return torch.cat([attack.onward(net, x[part], y[part], threat, x[part]).x_adv for part in parts])


def interval(k: int, n: int) -> dict[str, float]:
    """A share with its interval."""
    low, high = wilson(k, n)
    return {"estimate": k / n, "low": low, "high": high}


def autoattack(
    clock: Clock, checkpoint: Path, folder: Path, data: dict[str, Any], n: int, *, dry: bool = False, batch: int = 500
) -> dict[str, Any]:
    """Robust accuracy under the standard AutoAttack, by the product's audit; it goes on where it was stopped.

    Args:
        clock: of this call.
        checkpoint: the bundle.
        folder: of the audit.
        data: the section `dataset` of a recipe; its test images are taken in the audit's seeded order.
        n: how many.
        dry: with next to no steps.
        batch: images at a time.

    Raises:
        TimeUp: the audit was stopped.
    """
    policy = QUICK if dry else AUTOATTACK
    words = ["audit", checkpoint, "--dataset", data["test"][0], "--policy", policy, "--n", n, "--batch-size", batch]
    clock.robustkd(*words, "--device", "auto", "--output", folder, "--resume", "--json", ok=(0, 10, 11, 12))
    result = AuditResult.model_validate_json(Bundle.open(folder, kind="audit").file("result.json").read_bytes())
    return {
        **result.engine.robust_accuracy.model_dump(),
        "n": result.dataset.n,
        "seed": result.seed,
        "policy": read_policy(str(policy)).name,
        "device": result.artifact.device,
        "seconds": round(result.seconds, 1),
        "attacks": {name: told.robust_accuracy for name, told in result.engine.attacks.items()},
    }
