"""Results and bundles as an audit writes them, small and made of random images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robustkd import bundle as bundles
from robustkd.result import (
    Artifact,
    AttackResult,
    AuditResult,
    Check,
    Dataset,
    Difference,
    Interval,
    Side,
    Source,
    Status,
    Verdict,
)
from robustkd.threat import ThreatModel

CLASSES = ("shirt", "shoe", "bag")
N = 20


def side(clean: float, robust: float) -> Side:
    """One side with an attack of every level."""
    levels = ("baseline", "replay", "surrogate", "blackbox")
    return Side(
        clean_accuracy=Interval(estimate=clean, low=clean - 0.03123, high=clean + 0.02987),
        robust_accuracy=Interval(estimate=robust, low=robust - 0.04321, high=robust + 0.04111),
        attacks={
            f"attack-{level}": AttackResult(
                level=level,
                robust_accuracy=robust + i / 90,
                low=robust + i / 90 - 0.04,
                high=robust + i / 90 + 0.04,
                forward_calls=1000 * i + 7,
                seconds=1.5 * i,
                images=900 + i,
                broken=40 + i,
                note="a note",
            )
            for i, level in enumerate(levels)
        },
    )


def result(
    status: Status = "pass", *, source: bool = True, path: str = "runs/demo/cpu-int8/model.onnx", **changes: Any
) -> AuditResult:
    """A complete result; `changes` replace whole fields."""
    difference = Difference(
        clean=Interval(estimate=0.0021, low=-0.004, high=0.0083),
        robust=Interval(estimate=0.0057, low=-0.0012, high=0.0126),
        mcnemar_p=0.146,
        b=9,
        c=3,
    )
    values: dict[str, Any] = {
        "artifact": Artifact(
            path=path,
            sha256="sha256:" + "a1" * 32,
            runtime="onnxruntime",
            runtime_version="1.23",
            precision="int8",
            device="CPU",
            settings={"threads": 1},
        ),
        "source": Source(path="runs/demo/checkpoint", sha256="sha256:" + "b2" * 32) if source else None,
        "threat": ThreatModel(),
        "dataset": Dataset(name="fashion", split="test", n=1234, sha256="sha256:" + "c3" * 32),
        "policy": {"name": "quick", "apgd_steps": 100, "bounds": {"tolerance": 1.0, "min_robust": None}},
        "seed": 3,
        "seconds": 75.25,
        "engine": side(0.8419, 0.7317),
        "source_model": side(0.844, 0.7374) if source else None,
        "difference": difference if source else None,
        "checks": (
            Check(name="deterministic", status="ok", observed=0.0, bound=0.0, message="three calls agreed"),
            Check(name="half radius", status="block", observed=0.4, bound=0.1, message="accuracy survives at 0.5"),
            Check(name="twin", status="skipped", message="there is no twin"),
            Check(name="agreement", status="warn", observed=0.97, low=0.95, high=0.99, bound=0.98, message="close"),
        ),
        "verdict": Verdict(status=status, reasons=("the robust drop is at most 1.3 points", "the tolerance is 1.0")),
    }
    return AuditResult(**(values | changes))


def images(channels: int = 1, size: int = 8, eps: float = 8 / 255) -> dict[str, np.ndarray]:
    """Arrays of adversarial.npz."""
    rng = np.random.default_rng(0)
    x = rng.random((N, channels, size, size), dtype=np.float32)
    noise = eps * rng.choice([-1, 1], x.shape)
    x_adv = np.clip(x + noise, 0, 1).astype(np.float32)
    return {"x": x, "x_adv": x_adv, "y": np.arange(N) % 3, "index": 100 + np.arange(N)}


def records(broken: int = 15) -> pa.Table:
    """Records: the first `broken` images break, image 0 was wrong from the start."""
    y = np.arange(N) % 3
    clean = y.copy()
    clean[0] = 1
    robust = np.arange(N) >= broken
    return pa.table(
        {
            "index": 100 + np.arange(N),
            "label": y,
            "clean_prediction": clean,
            "adversarial_prediction": np.where(robust, y, (y + 1) % 3),
            "robust": robust,
        }
    )


def metrics() -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    lines: list[dict[str, Any]] = []
    for epoch in range(3):
        for step in range(4 * epoch, 4 * epoch + 4):
            loss = 2.0 / (1 + step)
            speed = {"images_per_s": 900.0, "inner_share": 0.7}
            lines.append({"step": step, "epoch": epoch, "lr": 0.1, "loss": loss, "kl_robust": loss / 2, **speed})
        found = {"clean_accuracy": 0.6 + epoch / 10, "robust_accuracy": 0.4 + epoch / 10}
        lines.append({"step": 4 * epoch + 3, "epoch": epoch, **found})
    return lines


def audit_bundle(
    run: Path, target: str = "cpu-int8", *, given: AuditResult | None = None, classes: tuple[str, ...] = CLASSES
) -> Path:
    """A run folder with checkpoint, exported file and audit; returns the audit's folder."""
    if not (run / "checkpoint").exists():
        model = bundles.ModelInfo(architecture="resnet18", classes=classes, input_shape=(1, 8, 8))
        with bundles.create(run / "checkpoint", "checkpoint", model=model, threat=ThreatModel()) as (work, _):
            (work / "model.safetensors").write_bytes(b"weights")
            (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    with bundles.create(run / target, "onnx", parent=bundles.Bundle.open(run / "checkpoint"), precision="int8") as (work, _):
        (work / "model.onnx").write_bytes(b"graph")
    with bundles.create(run / target / "audit", "audit", parent=bundles.Bundle.open(run / target)) as (work, _):
        (work / "result.json").write_text((given or result()).model_dump_json(by_alias=True))
        pq.write_table(records(), work / "records.parquet")
        np.savez(work / "adversarial.npz", **images())
    return run / target / "audit"
