"""What this machine can build and run, and which TensorRT is meant by `--trt` here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from robustkd.engines._driver import Driver, probe
from robustkd.engines._plan import PlanKind
from robustkd.engines._tensorrt import FAMILIES, check_version, installed, installed_version, numbers
from robustkd.errors import RequirementError
from robustkd.recipe.target import Target

RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPUs that TensorRT-RTX 1.7 knows; it has no Jetson Orin (sm87) and no H100 (sm90)."""


class Machine(NamedTuple):
    """What decides: the driver's answer and which packages are here."""

    driver: Driver
    classic: bool
    rtx: bool

    @property
    def capability(self) -> str | None:
        """The first GPU's, as in sm86."""
        return self.driver.gpus[0].capability if self.driver.gpus else None


class Ability(NamedTuple):
    """Whether a target can be built and run here; the reasons are empty where it can."""

    cannot_build: str
    cannot_run: str


def this_machine(look: Callable[[], Driver] = probe) -> Machine:
    """Look; nothing is imported."""
    return Machine(look(), installed("trt"), installed("rtx"))


def choose(
    asked: PlanKind, machine: Machine, *, precision: str = "", place: str = "BUNDLE", gpus: Iterable[str] = ()
) -> PlanKind:
    """The kind to build: `rtx` is itself, `trt` is the TensorRT of this machine.

    Raises:
        RequirementError: it cannot be built here; the fix is the command to run on the device.
    """
    if asked == "rtx":
        if not machine.rtx:
            raise RequirementError("TensorRT-RTX is not installed here", where="--rtx", fix=FAMILIES["rtx"].install)
        return "rtx"
    if machine.classic and machine.driver.gpus:
        if wrong := _other_gpu(gpus, machine):
            raise RequirementError(
                f"the target cannot be built here: {wrong}", where="gpus", fix=device_command(place, precision)
            )
        return "trt"
    if machine.rtx and machine.capability in RTX_GPUS:
        return "rtx"
    raise RequirementError(
        f"no TensorRT engine can be built here: {_no_classic(machine)}",
        where="--trt means the TensorRT of this machine",
        fix=device_command(place, precision) + "; or build for GeForce and RTX GPUs here with --rtx",
    )


def device_command(place: str, precision: str = "") -> str:
    """What to run on a device: it has no torch, and builds from the ONNX file."""
    wanted, given = f" --precision {precision}" if precision else "", Path(place)
    if given.suffix == ".onnx" or (given / "model.onnx").is_file():
        return f"copy {given.name} to the device and run there: robustkd export {given.name} --trt{wanted}"
    made = f"export with --onnx{wanted} here, copy that bundle to the device"
    return f"{made} and run there: robustkd export BUNDLE --trt{wanted}"


def ability(target: Target, machine: Machine) -> Ability:
    """Whether a target can be built from a checkpoint here, and run here."""
    no_torch = "" if find_spec("torch") else "torch is not installed: pip install 'robustkd[train]'"
    if target.kind == "onnx":
        return Ability(no_torch, "" if find_spec("onnxruntime") else "ONNX Runtime is not installed: pip install onnxruntime")
    if target.kind == "trt":
        why = "" if machine.classic and machine.driver.gpus else _no_classic(machine)
        return Ability(why or _other_gpu(target.gpus, machine), why or _other_gpu(target.gpus, machine))
    missing = "" if machine.rtx else f"TensorRT-RTX is not installed: {FAMILIES['rtx'].install}"
    return Ability(missing or no_torch, missing or _cannot_run_rtx(target.engine.capabilities, machine))


def tensorrt_facts(machine: Machine) -> dict[str, Any]:
    """For `robustkd doctor`: the driver, which TensorRT is installed, and what each can do with each GPU."""
    kinds: tuple[PlanKind, ...] = ("trt", "rtx")
    found = {kind: installed_version(kind) or "of unknown version" for kind in kinds if installed(kind)}
    return {
        "driver": {"cuda": machine.driver.cuda, "reason": machine.driver.reason},
        "gpus": [gpu._asdict() for gpu in machine.driver.gpus],
        "installed": {FAMILIES[kind].title: version for kind, version in found.items()},
        "support": [
            {"gpu": gpu.name, "capability": gpu.capability, "library": FAMILIES[kind].title, "why_not": why}
            for gpu in machine.driver.gpus
            for kind, version in found.items()
            for why in (unsupported(kind, version, gpu.capability),)
        ],
    }


def unsupported(kind: PlanKind, version: str, capability: str) -> str:
    """Why a TensorRT of this version does not serve a GPU, as NVIDIA's support matrices have it; empty where it does."""
    title = FAMILIES[kind].title
    try:
        check_version(kind, version)
    except RequirementError as error:
        return f"{error.what}; {error.fix}" if numbers(version) else ""
    if kind == "rtx":
        return "" if capability in RTX_GPUS else f"{title} has no {capability}; use TensorRT"
    if capability == "sm87" and numbers(version)[:2] >= (11, 2):
        return f"{title} 11.2 to 11.4 do not support JetPack; use the one that JetPack brings"
    return ""


def _no_classic(machine: Machine) -> str:
    missing = [] if machine.classic else ["TensorRT is not installed"]
    return " and ".join([*missing, *([machine.driver.reason] if not machine.driver.gpus else [])]) or "unknown"


def _other_gpu(wanted: Iterable[str], machine: Machine) -> str:
    wanted = tuple(wanted)
    return f"it is for {', '.join(wanted)}, this is {machine.capability}" if wanted and machine.capability not in wanted else ""


def _cannot_run_rtx(wanted: Iterable[str], machine: Machine) -> str:
    if not machine.driver.gpus:
        return machine.driver.reason
    return _other_gpu(tuple(wanted) or RTX_GPUS, machine)
