"""An ONNX file through ONNX Runtime on the CPU.

The graph optimiser and the number of threads are recorded: on quantised graphs the optimiser alone changes
up to some per cent of the classes, so it is part of what an audit measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from robustkd.engines._base import EngineInfo, Images, Logits, check_images
from robustkd.engines._onnx_file import PREFIX, beyond_onnx, damaged, has_half_scales, metadata_of, precision_of, read_model
from robustkd.errors import ArtifactError, NumericsError, RequirementError

_CHUNK = 256
_LARGEST = 1 << 28  # values of one batch, 1 GiB: beyond it the header is damaged
#: makes int32 of the biases beside int8, with scales that it multiplies in the type they have: in fp16 most of those products
#: have lost their digits or are 0, and biases come out wrong or infinite (seen in ONNX Runtime 1.31)
_WRONG_IN_HALF = "WeightBiasQuantization"
_QUIET = 4  # only fatal messages: every error also arrives as an exception


class OrtEngine:
    """Runs an `.onnx` file of one image input (N, C, H, W) and one output of logits (N, K).

    Args:
        path: the file; its batch dimension may be free or fixed.
        threads: inside an operator; left out, OMP_NUM_THREADS or the cores this process may use.
        optimize: run the graph optimiser, as deployments do.

    Raises:
        ArtifactError: the file is missing, damaged, or not an image classifier.
        RequirementError: onnx or onnxruntime is missing.
    """

    summary: ClassVar[str] = ".onnx files through ONNX Runtime on the CPU"

    def __init__(self, path: Path, threads: int | None = None, optimize: bool = True) -> None:
        try:
            self._load(path, threads or _threads(), optimize)
        except UnicodeDecodeError as error:  # from either library, wherever it turns a damaged name into text
            raise damaged(path, "a name in it is not text") from error

    def _load(self, path: Path, threads: int, optimize: bool) -> None:
        model = read_model(path)
        self.metadata: dict[str, str] = metadata_of(model)
        precision, beyond = precision_of(model), beyond_onnx(model)
        left_out = (_WRONG_IN_HALF,) if optimize and has_half_scales(model) else ()
        del model
        runtime = _runtime()
        self._path, self._errors = path, _errors()
        try:
            self._session: Any = open_session(_named(path), threads=threads, optimize=optimize, left_out=left_out)
        except self._errors as error:
            raise damaged(path, beyond or _first_line(error)) from error
        self._input, self._output, self._batch, shape = self._signature()
        self.info = EngineInfo(
            runtime="onnxruntime",
            runtime_version=runtime.__version__,
            precision=precision,
            device="cpu",
            input_shape=shape,
            classes=self._count_classes(shape),
            max_batch=self._batch or self._stated_batch(),
            settings={
                "provider": self._session.get_providers()[0],
                "threads": threads,
                "graph_optimization": "all" if optimize else "none",
                **({"disabled_optimizers": list(left_out)} if left_out else {}),
            },
        )
        self._chunk = self._batch or min(_CHUNK, self.info.max_batch or _CHUNK)

    def _signature(self) -> tuple[str, str, int | None, tuple[int, int, int]]:
        """Names of input and output, the fixed batch if there is one, and (C, H, W)."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise self._unfit(f"it has {len(inputs)} inputs and {len(outputs)} outputs")
        given, shape = inputs[0], inputs[0].shape
        if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape[1:]):
            raise self._unfit(f"its input {given.name} has shape {shape}")
        if given.type != "tensor(float)":
            raise self._unfit(f"its input {given.name} is {given.type}")
        batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        if (batch or 1) * math.prod(shape[1:]) > _LARGEST:
            raise self._unfit(f"its input {given.name} of shape {shape} is larger than any batch of images")
        return given.name, outputs[0].name, batch, (shape[1], shape[2], shape[3])

    def _count_classes(self, shape: tuple[int, int, int]) -> int:
        """The width of the logits, from one run: shows too that the graph runs at all."""
        rows = self._batch or 1
        out = self._run(np.zeros((rows, *shape), np.float32))
        if out.ndim != 2 or len(out) != rows or not np.issubdtype(out.dtype, np.floating):
            raise self._unfit(f"its output {self._output} is {out.dtype} of shape {out.shape} for {rows} images")
        return int(out.shape[1])

    def _stated_batch(self) -> int | None:
        stated = self.metadata.get(f"{PREFIX}max_batch", "")
        return int(stated) if stated.isdecimal() and int(stated) else None

    def _unfit(self, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self._path.name} is not an image classifier: {reason}",
            where=str(self._path),
            fix="export one float32 input (N, C, H, W) of fixed C, H, W and one output of logits (N, K)",
        )

    def _run(self, x: Images) -> Any:
        try:
            return self._session.run([self._output], {self._input: x})[0]
        except self._errors as error:
            raise self._unfit(f"it does not run: {_first_line(error)}") from error

    def logits(self, x: Images) -> Logits:
        """(N, C, H, W) float32 in [0, 1] -> (N, K) float32, in chunks; a fixed batch is filled up with zeros.

        Raises:
            ArtifactError: the images have another shape or type, or the graph refuses them.
            NumericsError: the graph returns another number of logits than at first.
        """
        check_images(x, self.info)
        out = np.empty((len(x), self.info.classes), np.float32)
        for start in range(0, len(x), self._chunk):
            part = x[start : start + self._chunk]
            rows = self._run(self._filled(part))[: len(part)]
            if rows.shape != (len(part), self.info.classes):
                raise NumericsError(
                    f"{len(part)} images gave logits of shape {rows.shape}",
                    where=str(self._path),
                    fix="export a graph of one (N, classes) output",
                )
            out[start : start + len(part)] = rows
        return out

    def _filled(self, part: Images) -> Images:
        if self._batch is None or len(part) == self._batch:
            return np.ascontiguousarray(part)
        full = np.zeros((self._batch, *part.shape[1:]), np.float32)
        full[: len(part)] = part
        return full

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def open_session(model: str | bytes, *, threads: int | None = None, optimize: bool = True, left_out: Sequence[str] = ()) -> Any:
    """An ONNX Runtime session of a file, or of a model's bytes, on the CPU; `left_out` are passes of its optimiser by name.

    Raises:
        RequirementError: ONNX Runtime is missing.
    """
    runtime = _runtime()
    options = _options(runtime, threads or _threads(), optimize)
    # without its fallback, which prints to stdout and then tries the same provider once more
    more = {"disabled_optimizers": [*left_out]} if left_out else {}
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0, **more)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RequirementError(
            "running .onnx files needs ONNX Runtime", where=str(error), fix="pip install onnxruntime"
        ) from error
    return onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base but Exception, and those of its Python layer."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
    return (*own, RuntimeError)


def _options(runtime: Any, threads: int, optimize: bool) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = _QUIET
    # after a run its threads would spin for a while and take the cores of whatever runs next: torch, another session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _threads() -> int:
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdecimal() and int(stated):
        return int(stated)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _named(path: Path) -> str | bytes:
    """The name of a file, or its content where the name is no text: a locale without its letters made it from bytes."""
    name = str(path)
    return name if not any("\ud800" <= letter <= "\udfff" for letter in name) else path.read_bytes()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


ENTRY = OrtEngine
