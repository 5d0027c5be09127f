"""What an export costs in robustness: one student in every precision through the importer, each audited on the GPU.

    python -m bench.gpu.export_loss --data DATA --output OUT --checkpoint RUN [--n 5000] [--policy standard] [--minutes 9]

The same command goes on until it ends with 0 (75: the time was up). Every file is held against the checkpoint on the same
images: the interval of the difference is paired. TF32 is off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.gpu import measure
from bench.gpu.common import (
    AGAIN,
    Clock,
    Failed,
    TimeUp,
    data_set,
    graceful,
    parser,
    percent,
    save,
    say,
    setting,
    table,
    told,
    write_text,
)
from robustkd.bundle import MANIFEST, Bundle
from robustkd.result import AuditResult

TARGETS = {
    "fp32": "kind: onnx\nprecision: fp32\n",
    "fp16": "kind: onnx\nprecision: fp16\n",
    "int8": "kind: onnx\nprecision: int8\nint8_profile: trt\n",
    "int8-cpu": "kind: onnx\nprecision: int8\nint8_profile: ort-cpu\n",
}
"""int8 as TensorRT wants it, and as ONNX Runtime does on CPUs."""


def main(argv: list[str]) -> int:
    given = parser(__doc__)
    given.add_argument("--checkpoint", type=Path, help="a checkpoint bundle, or the run it lies in; --dry trains one")
    given.add_argument("--precisions", type=lambda text: tuple(text.split(",")), default=tuple(TARGETS))
    given.add_argument("--n", type=int, default=5000, help="test images; all there are, at most")
    given.add_argument("--policy", default="standard")
    given.add_argument("--batch-size", type=int, default=500)
    asked = given.parse_args(argv)
    graceful()
    clock, command = Clock(asked.minutes), told("export_loss", argv)
    code, found = 0, {}
    try:
        for name in asked.precisions:
            found[name] = row(name, asked, clock)
            tell(asked, found, command)
    except TimeUp:
        say("the time is up; the same command goes on")
        code = AGAIN
    except Failed as error:
        say(str(error))
        code = 1
    tell(asked, found, command)
    return code


def row(name: str, asked: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """One precision: exported, and audited from where an earlier call left it."""
    data = data_set(asked)
    source = checkpoint(asked, clock, data)
    target = asked.output / "targets" / f"{name}.yaml"
    write_text(target, TARGETS[name])
    bundle = asked.output / "export" / name
    if not (bundle / MANIFEST).is_file():
        # calibration images are those of the recipe, and the checkpoint may have been made elsewhere
        amended = ["--calib", data["train"][0]] if name.startswith("int8") else []
        clock.robustkd("export", source, "--target", target, "--output", asked.output / "export", *amended)
    n, policy = (24, measure.QUICK) if asked.dry else (asked.n, asked.policy)
    folder = asked.output / "audits" / name
    words = ["audit", bundle, "--source", source, "--dataset", data["test"][0], "--policy", policy, "--n", n, "--resume"]
    words += ["--device", "auto", "--runtime", "onnx-torch", "--batch-size", asked.batch_size, "--output", folder, "--json"]
    clock.robustkd(*words, ok=(0, 10, 11, 12))
    result = AuditResult.model_validate_json(Bundle.open(folder, kind="audit").file("result.json").read_bytes())
    assert result.source_model is not None and result.difference is not None  # there was a source
    return {
        "n": result.dataset.n,
        "seed": result.seed,
        "device": result.artifact.device,
        "sha256": result.artifact.sha256,
        "source_sha256": result.source.sha256 if result.source else None,
        "clean": result.engine.clean_accuracy.model_dump(),
        "robust": result.engine.robust_accuracy.model_dump(),
        "source_robust": result.source_model.robust_accuracy.model_dump(),
        "difference": result.difference.model_dump(),
        "verdict": result.verdict.model_dump(),
        "warnings": [check.message for check in result.checks if check.status in ("warn", "block")],
        "attacks": {key: value.robust_accuracy for key, value in result.engine.attacks.items()},
        "seconds": round(result.seconds, 1),
    }


def checkpoint(asked: argparse.Namespace, clock: Clock, data: dict[str, Any]) -> Path:
    """The student; a dry run trains one for a moment."""
    if asked.checkpoint is not None:
        inside = asked.checkpoint / "checkpoint"
        return inside if (inside / MANIFEST).is_file() else asked.checkpoint
    if not asked.dry:
        raise SystemExit("name the student: --checkpoint RUN")
    words: list[Any] = ["--recipe", "quickstart-standard", "--set", "student={name: resnet18, width: 0.0625, stem_stride: 2}"]
    for key in ("name", "train", "test"):
        words += setting(f"dataset.{key}", data[key])
    words += ["--set", "train={epochs: 8, batch_size: 32, threads: 1, schedule: {warmup: 1}}", "--set", "dataset.holdout=20"]
    return clock.distill(asked.output / "run", *words)


def tell(asked: argparse.Namespace, found: dict[str, Any], command: list[str]) -> None:
    """The table as JSON and Markdown, of what there is so far."""
    missing = [name for name in asked.precisions if name not in found]
    save(asked.output, "export_loss", {"rows": found, "unfinished": missing, "policy": str(Path(asked.policy).name)}, command)
    head = ["file", "clean", "robust", "checkpoint, robust", "robust lost, points", "verdict"]
    lines = [
        [
            name,
            percent(told_["clean"]),
            percent(told_["robust"]),
            percent(told_["source_robust"]),
            percent(told_["difference"]["robust"]),
            told_["verdict"]["status"],
        ]
        for name, told_ in found.items()
    ]
    top = "A dry run: the figures mean nothing.\n\n" if asked.dry else ""
    first = next(iter(found.values()), None)
    if first is not None:
        top += f"{first['n']} test images, seed {first['seed']}, policy {Path(asked.policy).name}, {first['device']}. Percent, "
        top += "95 % intervals; the loss is paired, image by image, against the checkpoint under the same attacks.\n\n"
    write_text(asked.output / "export_loss.md", top + table(head, lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
