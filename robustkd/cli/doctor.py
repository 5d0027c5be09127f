"""`robustkd doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from robustkd.cli._extras import EXTRAS
from robustkd.cli._print import Json, columns, emit


def doctor(json: Json = False) -> None:
    """Say what this machine has, what is missing and how to get it. Always exits 0: a finding is no error."""
    findings = examine()
    if json:
        emit(findings)
        return
    columns(_rows(findings))
    for problem in findings["problems"]:
        typer.echo(f"problem: {problem['what']}\n  fix: {problem['fix']}")
    if not findings["problems"]:
        typer.echo("no problems found")


def examine() -> dict[str, Any]:
    """Everything doctor knows: `versions`, `hardware`, `gpus`, `tensorrt`, `extras`, `data`, `runs`, `problems`."""
    from robustkd.bundle import hardware, versions
    from robustkd.exporting.trt.machine import tensorrt_facts, this_machine

    found = versions()
    machine = hardware() | {"usable_cores": usable_cores(), "load": round(os.getloadavg()[0], 2)}
    gpus, problems = _gpus(), [*_pair(found), *_load(machine)]
    data, runs = _data(), _runs()
    if not runs["writable"]:
        fix = "run somewhere else, or set ROBUSTKD_RUNS to a folder you can write"
        problems.append({"what": f"the runs folder {runs['path']} cannot be written", "fix": fix})
    extras = {extra.name: {"missing": extra.missing(), "enables": extra.enables, "install": extra.install} for extra in EXTRAS}
    return {
        "versions": found,
        "hardware": machine,
        "gpus": gpus,
        "tensorrt": tensorrt_facts(this_machine()),
        "extras": extras,
        "data": data,
        "runs": runs,
        "problems": problems,
    }


def usable_cores() -> int:
    """The cores this process may use, which a container or batch system can make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pair_problem(torch: str, torchvision: str) -> str | None:
    """What is wrong with a pair of versions: torch 2.m goes with torchvision 0.(m + 15), of the same build."""
    ours, theirs = _numbers(torch), _numbers(torchvision)
    if ours is None or theirs is None or ours[0] != 2 or theirs[0] != 0:
        return None
    if theirs[1] != ours[1] + 15:
        return f"torch {torch} goes with torchvision 0.{ours[1] + 15}, but {torchvision} is installed"
    build, other = torch.partition("+")[2], torchvision.partition("+")[2]
    if build and other and build != other:
        return f"torch is built for {build}, torchvision for {other}"
    return None


def _numbers(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def import_error(module: str) -> str | None:
    """The last line of what importing a module says, or None if it imports; tried in a process of its own."""
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["no message"])[-1]


def _pair(found: dict[str, str]) -> list[dict[str, str]]:
    """The pair by its version numbers, then by trying: a CPU torch beside a CUDA torchvision has good numbers."""
    if "torch" not in found or "torchvision" not in found:
        return []
    what = pair_problem(found["torch"], found["torchvision"])
    if what is None:
        reason = import_error("torchvision")
        if reason is None:
            return []
        what = f"torchvision {found['torchvision']} does not import beside torch {found['torch']}: {reason}"
    fix = "install both from the same place: pip install --force-reinstall torch torchvision"
    return [{"what": what, "fix": fix}]


def _load(machine: dict[str, Any]) -> list[dict[str, str]]:
    if machine["load"] <= machine["usable_cores"]:
        return []
    what = f"the load is {machine['load']} on {machine['usable_cores']} core(s): training will crawl"
    return [{"what": what, "fix": "stop other work, or give --threads 1"}]


def _gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as the driver sees them, whatever Python packages are installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "memory", "driver", "compute_capability")
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in answer.splitlines() if line.strip()]


def _data() -> dict[str, Any]:
    root = Path(os.environ.get("ROBUSTKD_DATA", "data")).expanduser()
    return {
        "path": str(root),
        "exists": root.is_dir(),
        "set_by": "ROBUSTKD_DATA" if "ROBUSTKD_DATA" in os.environ else "default",
    }


def _runs() -> dict[str, Any]:
    """The runs folder; where it does not exist yet, whether it can be made."""
    path = Path(os.environ.get("ROBUSTKD_RUNS", "runs")).expanduser()
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {"path": str(path), "exists": path.is_dir(), "writable": writable}


def _rows(findings: dict[str, Any]) -> list[tuple[str, str]]:
    machine, data, runs = findings["hardware"], findings["data"], findings["runs"]
    rows = [*findings["versions"].items()]
    rows.append(("cpu", f"{machine['cpu']}, {machine['usable_cores']} usable core(s), load {machine['load']}"))
    rows += [("gpu", ", ".join(gpu.values())) for gpu in findings["gpus"]] or [("gpu", "none that nvidia-smi knows")]
    rows += _tensorrt(findings["tensorrt"])
    for name, extra in findings["extras"].items():
        missing = extra["missing"]
        rows.append((f"[{name}]", f"installed: can {extra['enables']}" if not missing else _want(extra)))
    rows.append(("data", f"{data['path']} ({'exists' if data['exists'] else 'does not exist'}, {data['set_by']})"))
    rows.append(("runs", f"{runs['path']} ({'can' if runs['writable'] else 'cannot'} be written)"))
    return rows


def _tensorrt(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The driver, and each GPU beside each TensorRT that is installed."""
    driver = found["driver"]
    rows = [("driver", f"for CUDA {driver['cuda']}" if driver["cuda"] else driver["reason"])]
    if not found["installed"]:
        return [*rows, ("tensorrt", "neither TensorRT nor TensorRT-RTX is installed")]
    for title, version in found["installed"].items():
        pairs = [pair for pair in found["support"] if pair["library"] == title]
        able = [f"{p['gpu']} ({p['capability']}): {p['why_not'] or 'builds and runs'}" for p in pairs]
        alone = "builds engines here, runs none" if title.endswith("RTX") else "needs a GPU, also to build"
        rows.append((title.lower(), f"{version}; {'; '.join(able) or alone}"))
    return rows


def _want(extra: dict[str, Any]) -> str:
    return f"missing {', '.join(extra['missing'])}; to {extra['enables']}: {extra['install']}"
