"""A plan in memory of a GPU: deserialised, one execution context, two buffers. Classic TensorRT and TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robustkd.engines._base import Images, Logits
from robustkd.engines._driver import Device
from robustkd.engines._plan import PlanKind
from robustkd.engines._runtime_cache import RuntimeCache, cache_file
from robustkd.engines._tensorrt import log_of
from robustkd.errors import ArtifactError

_FIX = "build it again on this machine with `robustkd export`, from the ONNX file it was made of"


class Session:
    """Runs batches whose size lies within the plan's profile.

    Args:
        trt: the library.
        kind: classic or RTX.
        path: the plan.
        trust: whether code inside the plan may run.
        device: memory and stream; left out, the first GPU.

    Raises:
        ArtifactError: the plan is refused, or is no image classifier.
        RequirementError: the driver refuses.
    """

    def __init__(self, trt: Any, kind: PlanKind, path: Path, *, trust: bool = False, device: Any = None) -> None:
        self._trt, self._path, self._log = trt, path, log_of(trt)
        self.device = device if device is not None else Device()
        self.device.activate()
        self._runtime = trt.Runtime(self._log.handle)  # lives as long as the engine
        if trust and kind == "trt":
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._refused("it is not accepted")
        self.settings: dict[str, Any] = {}
        self._cache: RuntimeCache | None = None
        self._context = self._rtx_context() if kind == "rtx" else self._engine.create_execution_context()
        if self._context is None:
            raise self._refused("it gives no execution context")
        self._input, self._output = self._names()
        self.profile, self.shape = self._sizes()
        self._in = self.device.allocate(4 * self.profile[2] * int(np.prod(self.shape)))
        self._reserved = 0
        self._out = 0

    def _rtx_context(self) -> Any:
        """All kernels compiled for a shape before its first use: the lazy ones change the logits of equal images."""
        trt, config = self._trt, self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self.settings = {"kernels": "eager", "cuda_graphs": False}
        self._cache = RuntimeCache(config, cache_file(self._path))
        self._log.lines.clear()  # that an older cache was rejected is no error of the engine
        return self._engine.create_execution_context(config)

    def _refused(self, reason: str) -> ArtifactError:
        logged = self._log.errors()
        return ArtifactError(
            f"{self._path.name} cannot be used here: {logged[0].splitlines()[0] if logged else reason}",
            where=str(self._path),
            fix=_FIX,
        )

    def _names(self) -> tuple[str, str]:
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        outputs = [name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            raise self._unfit(f"it has {len(inputs)} inputs and {len(outputs)} outputs")
        for name in (inputs[0], outputs[0]):
            if engine.get_tensor_dtype(name) != self._trt.DataType.FLOAT:
                raise self._unfit(f"{name} is not float32")
        return inputs[0], outputs[0]

    def _sizes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Batch sizes (min, opt, max) and (C, H, W)."""
        shape = tuple(self._engine.get_tensor_shape(self._input))
        if len(shape) != 4 or min(shape[1:]) < 1:
            raise self._unfit(f"its input {self._input} has shape {shape}")
        image = (int(shape[1]), int(shape[2]), int(shape[3]))
        if shape[0] > 0:
            return (int(shape[0]),) * 3, image
        low, best, high = (int(next(iter(size))) for size in self._engine.get_tensor_profile_shape(self._input, 0))
        return (low, best, high), image

    def _unfit(self, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self._path.name} is not an image classifier: {reason}",
            where=str(self._path),
            fix="build it from one float32 input (N, C, H, W) and one float32 output of logits (N, K)",
        )

    def run(self, x: Images) -> Logits:
        """(N, C, H, W) contiguous float32, N within the profile -> (N, K) float32.

        Raises:
            ArtifactError: the engine refuses the batch, or gives no (N, K).
        """
        context, device = self._context, self.device
        device.activate()
        self._log.lines.clear()
        if not context.set_input_shape(self._input, tuple(x.shape)) or context.infer_shapes():
            raise self._refused(f"a batch of shape {x.shape} is not accepted")
        shape = tuple(int(size) for size in context.get_tensor_shape(self._output))
        if len(shape) != 2 or shape[0] != len(x) or shape[1] < 1:
            raise self._unfit(f"its output {self._output} has shape {shape} for {len(x)} images")
        out = np.empty(shape, np.float32)
        if out.nbytes > self._reserved:
            self._reserved = 4 * self.profile[2] * shape[1]
            self._out = device.allocate(self._reserved)
        device.upload(self._in, x)
        context.set_tensor_address(self._input, self._in)
        context.set_tensor_address(self._output, self._out)
        if not context.execute_async_v3(device.stream):
            raise self._refused("it does not run")
        device.download(out, self._out)
        return out

    def close(self) -> None:
        """Keep the kernels compiled; free context, engine, runtime and memory, in this order."""
        if self._cache is not None:
            self._cache.save()
        self._cache = None
        self._context = self._engine = self._runtime = None
        self.device.close()
