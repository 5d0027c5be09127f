"""A classic TensorRT plan on the GPU of this machine; the base of TensorRT-RTX's engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from robustkd.engines import _driver, _first_load, _tensorrt
from robustkd.engines._base import EngineInfo, Images, Logits, check_images
from robustkd.engines._plan import Header, PlanKind, read_header
from robustkd.engines._session import Session
from robustkd.engines._tensorrt import FAMILIES, numbers
from robustkd.engines._vouched import Vouched, demand_trust, vouched
from robustkd.errors import ArtifactError, RequirementError


class Platform(NamedTuple):
    """What an engine needs of the machine; tests put a fake in its place, which says so in `info`."""

    probe: Callable[[], _driver.Driver] = _driver.probe
    library: Callable[[PlanKind], Any] = _tensorrt.library
    device: Callable[[], Any] = _driver.Device
    first_load: Callable[..., None] = _first_load.first_load
    fake: bool = False


HERE = Platform()


class TrtEngine:
    """Runs a `.engine` or `.plan` file: batches are cut to its profile and filled up with zeros, sizes kept few.

    Args:
        path: the plan; the bundle around it, if there is one, is checked first.
        trust: load it although no manifest vouches for it, and let code inside it run.
        platform: the machine.

    Raises:
        ArtifactError: the file is missing, changed, not vouched for, of another kind, or crashes when loaded.
        RequirementError: the driver, a GPU that it was built for, or the version of TensorRT is missing.
    """

    summary: ClassVar[str] = "TensorRT engines on an NVIDIA GPU or a Jetson; not yet run on hardware by robustkd's tests"
    kind: ClassVar[PlanKind] = "trt"

    def __init__(self, path: Path, *, trust: bool = False, platform: Platform = HERE) -> None:
        header, known = self._header(path), vouched(path)
        driver = platform.probe()
        if not driver.gpus:
            raise self._absent(path, known, driver.reason)
        demand_trust(path, known, trust=trust)
        library = platform.library(self.kind)
        self._same_version(path, header, known, str(library.__version__))
        self._same_gpu(path, header, known, driver.gpus[0])
        platform.first_load(self.kind, path, trust=trust)
        self._session = Session(library, self.kind, path, trust=trust, device=platform.device())
        self._sizes = _ladder(*self._session.profile)
        first = self._session.run(np.zeros((self._sizes[0], *self._session.shape), np.float32))
        self.info = EngineInfo(
            runtime=("fake-" if platform.fake else "") + FAMILIES[self.kind].runtime,
            runtime_version=str(library.__version__),
            precision=known.precision,
            device=driver.gpus[0].name,
            input_shape=self._session.shape,
            classes=first.shape[1],
            max_batch=self._session.profile[2],
            settings={
                "cuda": driver.cuda,
                "capability": driver.gpus[0].capability,
                "batch": list(self._session.profile),
                "tf32": known.facts.get("tf32"),
                **self._session.settings,
            },
        )

    def _header(self, path: Path) -> Header | None:
        header = read_header(path)
        if header is not None and header.kind != self.kind:
            raise ArtifactError(
                f"{path.name} is a plan of {FAMILIES[header.kind].title}, not of {FAMILIES[self.kind].title}",
                where=str(path),
                fix="let robustkd choose the engine: name the file or its bundle",
            )
        return header

    def _absent(self, path: Path, known: Vouched, reason: str) -> RequirementError:
        title, built_for = FAMILIES[self.kind].title, _built_for(known) or "the GPU it was built for"
        twin = (
            next((path.parent / n for n in known.bundle.manifest.files if n.endswith(".onnx")), None) if known.bundle else None
        )
        here = f", or take the ONNX file it was built from here: {twin}" if twin else ""
        return RequirementError(
            f"this machine cannot run a {title} engine: {reason}",
            where=str(path),
            fix=f"copy the bundle to a machine with {built_for} and run the same command there{here}",
        )

    def _same_version(self, path: Path, header: Header | None, known: Vouched, here: str) -> None:
        """An engine belongs to the version that built it; a version-compatible one runs on later ones too."""
        built = known.facts.get("builder_version") or (header.version if header else None)
        if built is None:
            return
        known_by = min(len(numbers(built)), len(numbers(here)))  # 10.3.0 says of itself what a header calls 10.3.0.26
        was, now = numbers(built)[:known_by], numbers(here)[:known_by]
        later = known.facts.get("version_compatible") and now >= was
        if was != now and not later:
            title = FAMILIES[self.kind].title
            raise RequirementError(
                f"{path.name} was built by {title} {built}, and {title} {here} is installed",
                where=str(path),
                fix=f"build it again here: {rebuild(self.kind, known)}",
            )

    def _same_gpu(self, path: Path, header: Header | None, known: Vouched, gpu: _driver.Gpu) -> None:
        told = known.facts.get("capabilities") or (header.targets if header else ())
        ampere = known.facts.get("hardware_compatible") == "ampere_plus" and _at_least(gpu.capability, 80)
        newer = "newer" in told and _at_least(gpu.capability, 80)
        if told and gpu.capability not in told and not ampere and not newer:
            raise RequirementError(
                f"{path.name} was built for {', '.join(told)}, and this machine has {gpu.name} ({gpu.capability})",
                where=str(path),
                fix=f"build it again here: {rebuild(self.kind, known)}",
            )

    def logits(self, x: Images) -> Logits:
        """(N, C, H, W) float32 in [0, 1] -> (N, K) float32, in batches of a few sizes, the last one filled with zeros.

        Raises:
            ArtifactError: the images have another shape or type, or the engine refuses them.
        """
        check_images(x, self.info)
        out, largest = np.empty((len(x), self.info.classes), np.float32), self._sizes[-1]
        for start in range(0, len(x), largest):
            part = x[start : start + largest]
            size = next(size for size in self._sizes if size >= len(part))
            batch = np.zeros((size, *self.info.input_shape), np.float32)
            batch[: len(part)] = part
            out[start : start + len(part)] = self._session.run(batch)[: len(part)]
        return out

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.close()


def _ladder(low: int, best: int, high: int) -> tuple[int, ...]:
    """The batch sizes that are run: the profile's own and powers of two between; every size costs a compilation."""
    powers = (1 << bit for bit in range(high.bit_length()))
    return tuple(sorted({low, best, high, *(size for size in powers if low < size < high)}))


def _at_least(capability: str, number: int) -> bool:
    digits = capability.removeprefix("sm")
    return digits.isdecimal() and int(digits) >= number


def _built_for(known: Vouched) -> str:
    gpu = known.facts.get("gpu") or {}
    return str(gpu.get("name") or " or ".join(known.facts.get("capabilities") or ()))


def rebuild(kind: PlanKind, known: Vouched | None = None) -> str:
    """The command that builds an engine on the machine it is run on."""
    place = known.bundle.path.name if known and known.bundle else "BUNDLE"
    return f"robustkd export {place} --{kind}"


ENTRY = TrtEngine
