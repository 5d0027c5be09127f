"""TensorRT-RTX on this GPU: does an engine built by default, or for SM80, load and run?

    python -m bench.gpu.rtx --output OUT [--wheels FOLDER]

Writes rtx.json with the outcome: `runs` (and how near the logits are to ONNX Runtime's), `refused` (with the library's exact
words), or `not tried` (and why). Every load happens in a process of its own: a crash is an outcome too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.common import ROOT, graceful, parser, read, save, say, told

ENGINES: dict[str, tuple[str, ...]] = {"default": (), "sm80": ("sm80",)}
SHAPE = (3, 32, 32)
SECONDS = 120


def main(argv: list[str]) -> int:
    if argv[:1] == ["--child"]:
        return child(argv[1], Path(argv[2]))
    given = parser(__doc__, data=False)
    given.add_argument("--wheels", type=Path, help="a folder with the wheels of TensorRT-RTX, installed below --output")
    asked = given.parse_args(argv)
    graceful()
    asked.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"engines": {}}
    env = dict(os.environ)
    if asked.wheels is not None:
        site = asked.output.resolve() / "site"
        found["install"] = install(asked.wheels, site)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    for name in ENGINES:
        for part in ("build", "load"):
            found["engines"].setdefault(name, {})[part] = apart(part, name, asked.output, env)
    found["outcome"] = outcome(found["engines"])
    save(asked.output, "rtx", found, told("rtx", argv))
    say(f"TensorRT-RTX: {found['outcome']}")
    return 0


def install(wheels: Path, site: Path) -> dict[str, Any]:
    """pip, without a network."""
    files = sorted(map(str, wheels.glob("*.whl")))
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(site), *files]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return {"wheels": [Path(file).name for file in files], "code": done.returncode, "said": done.stderr[-2000:]}


def apart(part: str, name: str, output: Path, env: dict[str, str]) -> dict[str, Any]:
    """One part in a process of its own; what it wrote, its exit code, the end of what it said."""
    file = output.resolve() / f"{name}-{part}.json"
    file.unlink(missing_ok=True)
    line = [sys.executable, "-m", "bench.gpu.rtx", "--child", f"{part}:{name}", str(output.resolve())]
    try:
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {**read(file), "error": f"took more than {SECONDS} seconds"}
    crash = {} if done.returncode == 0 else {"code": done.returncode, "said": done.stderr[-2000:]}
    return {**read(file), **crash}


def child(asked: str, folder: Path) -> int:
    """Build or load one engine, and write what happened after every stage."""
    from robustkd.bundle import write_json
    from robustkd.errors import RobustKDError

    part, _, name = asked.partition(":")
    told_: dict[str, Any] = {}
    try:
        for stage in build(name, folder) if part == "build" else load(name, folder):
            told_ |= stage
            write_json(folder / f"{name}-{part}.json", told_)
    except RobustKDError as error:
        told_ |= {"error": error.what, "where": error.where, "fix": error.fix}
    write_json(folder / f"{name}-{part}.json", told_)
    return 0


def build(name: str, folder: Path) -> Any:
    """A narrow ResNet-18 as an engine."""
    import torch

    from robustkd.catalog import Shelf
    from robustkd.engines._tensorrt import library, log_of
    from robustkd.exporting.to_onnx import to_onnx
    from robustkd.exporting.trt.builder import build as built
    from robustkd.recipe.target import EngineOptions

    trt = library("rtx")
    yield {"version": str(trt.__version__)}
    file = folder / "model.onnx"
    if not file.is_file():
        torch.manual_seed(0)
        net = Shelf("models").get("resnet18")(width=0.125).build(channels=SHAPE[0], classes=10).eval()
        to_onnx(net, file, input_shape=SHAPE, classes=[str(c) for c in range(10)])
    made = built(trt, log_of(trt), file.read_bytes(), "rtx", EngineOptions(capabilities=ENGINES[name]), batch=(1, 8, 64))
    (folder / f"{name}.engine").write_bytes(made.plan)
    yield {"seconds": made.seconds, "bytes": len(made.plan)}


def load(name: str, folder: Path) -> Any:
    """What the library says of the engine, then the product's own session, then logits beside ONNX Runtime's."""
    import numpy as np

    from robustkd.engines import _driver
    from robustkd.engines._session import Session
    from robustkd.engines._tensorrt import library, log_of
    from robustkd.engines.ort import OrtEngine
    from robustkd.errors import RequirementError

    driver = _driver.probe()
    if not driver.gpus:
        raise RequirementError(driver.reason, where="driver", fix="use a machine with an NVIDIA GPU")
    yield {"gpu": driver.gpus[0]._asdict(), "cuda": driver.cuda}
    file, trt = folder / f"{name}.engine", library("rtx")
    device, log = _driver.Device(), log_of(trt)  # its context is current from here on
    device.activate()
    runtime = trt.Runtime(log.handle)
    if hasattr(runtime, "get_engine_validity"):
        header = file.read_bytes()[: getattr(runtime, "engine_header_size", 64)]
        yield {"validity": str(runtime.get_engine_validity(header))}
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    yield {"deserialised": engine is not None, "log": log.text()[-4000:]}
    if engine is None:
        return
    session = Session(trt, "rtx", file)
    x = np.random.default_rng(0).random((8, *SHAPE), dtype=np.float32)
    got = session.run(x)
    with OrtEngine(folder / "model.onnx", threads=1) as wanted:
        gap = float(np.abs(got - wanted.logits(x)).max())
    yield {"runs": True, "largest_difference": gap, "settings": session.settings}


def outcome(engines: dict[str, dict[str, Any]]) -> str:
    """`runs`, `refused` or `not tried`, by the best engine."""
    loads = [engine.get("load", {}) for engine in engines.values()]
    if any(load.get("runs") for load in loads):
        return "runs"
    if any("deserialised" in load or "code" in load for load in loads) and any("gpu" in load for load in loads):
        return "refused"
    return "not tried"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
