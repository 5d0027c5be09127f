"""A TensorRT for tests: the interfaces robustkd touches, with ONNX Runtime in place of a GPU. It computes, and records.

Every attribute that our code reads or sets is kept in `Fake.touched`, so that it can be looked for in NVIDIA's real
bindings. Engines that run on it call themselves `fake-...`, and an audit refuses them.
"""

from __future__ import annotations

import ctypes
import json
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np

from robustkd.engines._driver import Driver, Gpu
from robustkd.engines._tensorrt import installed
from robustkd.engines.trt import Platform

Touched = set[tuple[str, str]]
ORIN, ADA = Gpu("Orin (fake)", "sm87"), Gpu("RTX 4090 (fake)", "sm89")


class Recorded:
    """An interface whose public attributes are recorded as (interface, attribute); its own code uses private ones."""

    def __init__(self, fake: Fake) -> None:
        object.__setattr__(self, "_fake", fake)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_fake").touched.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._fake.touched.add((type(self).__name__, name))
        object.__setattr__(self, name, value)


class Names:
    """An enumeration; members are plain numbers."""

    def __init__(self, fake: Fake, title: str, **members: int) -> None:
        self.__dict__.update(_fake=fake, _title=title, __members__=members)

    def __getattr__(self, name: str) -> int:
        if name not in self.__dict__["__members__"]:
            raise AttributeError(name)
        self._fake.touched.add((self._title, name))
        return int(self.__dict__["__members__"][name])


class ILogger:
    pass


class INetworkDefinition(Recorded):
    num_inputs = num_outputs = 1
    _onnx = b""

    def get_input(self, index: int, /) -> Any:
        import onnx

        value = onnx.load_from_string(self._onnx).graph.input[index]
        shape = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        self._fake.touched |= {("ITensor", "name"), ("ITensor", "shape")}
        return SimpleNamespace(name=value.name, shape=shape)


class OnnxParser(Recorded):
    num_errors = 1

    def __init__(self, fake: Fake, network: Any, handle: Any) -> None:
        super().__init__(fake)
        self._network = network

    def parse(self, data: bytes, /) -> bool:
        self._network._onnx = data
        return not self._fake.refuse

    def get_error(self, index: int, /) -> Any:
        self._fake.touched |= {("ParserError", name) for name in ("desc", "node_name", "node_operator")}
        return SimpleNamespace(desc=lambda: self._fake.refuse, node_name=lambda: "", node_operator=lambda: "Conv")


class IOptimizationProfile(Recorded):
    _sizes: tuple[int, ...] = ()

    def set_shape(self, name: str, low: Any, best: Any, high: Any, /) -> None:
        self._sizes = (low[0], best[0], high[0])


class ITimingCache(Recorded):
    def serialize(self) -> bytes:
        return b"measured"


class IBuilderConfig(Recorded):
    builder_optimization_level = 3
    hardware_compatibility_level = default_device_type = DLA_core = num_compute_capabilities = None

    def __init__(self, fake: Fake) -> None:
        super().__init__(fake)
        self._sizes, self._flags, self._caps, self._pools, self._cache = (0, 0, 0), {fake.TF32}, {}, {}, b""

    def set_flag(self, flag: int, /) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: int, /) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: int, size: int, /) -> None:
        self._pools[pool] = size

    def add_optimization_profile(self, profile: Any, /) -> int:
        self._sizes = profile._sizes
        return 0 if self._fake.takes_profile else -1

    def set_compute_capability(self, capability: int, index: int, /) -> bool:
        self._caps[index] = capability
        return True

    def create_timing_cache(self, data: bytes, /) -> Any:
        return data

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool, /) -> bool:
        self._cache = cache
        return cache != b"of another GPU"

    def get_timing_cache(self) -> Any:
        return ITimingCache(self._fake)


class Builder(Recorded):
    num_DLA_cores = 2

    def __init__(self, fake: Fake, handle: Any) -> None:
        super().__init__(fake)

    def create_network(self, flags: int, /) -> Any:
        assert flags == 1 << self._fake.strongly_typed
        return INetworkDefinition(self._fake)

    def create_builder_config(self) -> Any:
        self._fake.config = IBuilderConfig(self._fake)
        return self._fake.config

    def create_optimization_profile(self) -> Any:
        return IOptimizationProfile(self._fake)

    def build_serialized_network(self, network: Any, config: Any, /) -> bytes | None:
        return None if self._fake.build_fails else self._fake.plan(network._onnx, config._sizes)


class ICudaEngine(Recorded):
    num_io_tensors = 2

    def __init__(self, fake: Fake, sizes: tuple[int, int, int], data: bytes) -> None:
        import onnxruntime

        super().__init__(fake)
        self._sizes, self._session = sizes, onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self._tensors = [*self._session.get_inputs(), *self._session.get_outputs()]

    def get_tensor_name(self, index: int, /) -> str:
        return str(self._tensors[index].name)

    def get_tensor_mode(self, name: str, /) -> int:
        return 1 if name == self._tensors[0].name else 2

    def get_tensor_dtype(self, name: str, /) -> int:
        return self._fake.dtype

    def get_tensor_shape(self, name: str, /) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._tensors[0].shape]

    def get_tensor_profile_shape(self, name: str, profile: int, /) -> list[tuple[int, ...]]:
        return [(size, *self._tensors[0].shape[1:]) for size in self._sizes]

    def create_runtime_config(self) -> Any:
        self._fake.runtime_config = IRuntimeConfig(self._fake)
        return self._fake.runtime_config

    def create_execution_context(self, config: Any = None, /) -> Any:
        return IExecutionContext(self._fake, self)


class IRuntimeCache(Recorded):
    _data = b""

    def deserialize(self, data: bytes, /) -> bool:
        self._data = data if data.startswith(b"kernels") else b""
        return bool(self._data)

    def serialize(self) -> bytes:
        return b"kernels of this GPU" if self._fake.batches else self._data


class IRuntimeConfig(Recorded):
    dynamic_shapes_kernel_specialization_strategy = cuda_graph_strategy = -1
    _cache: Any = None

    def create_runtime_cache(self) -> Any:
        return IRuntimeCache(self._fake)

    def set_runtime_cache(self, cache: Any, /) -> bool:
        self._cache = cache
        return True


class IExecutionContext(Recorded):
    def __init__(self, fake: Fake, engine: ICudaEngine) -> None:
        super().__init__(fake)
        self._engine, self._shape, self._address = engine, (0,), dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool:
        low, _, high = self._engine._sizes
        self._shape = shape
        self._fake.batches.append(shape[0])
        return not high or low <= shape[0] <= high

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str, /) -> tuple[int, ...]:
        return (self._shape[0], 10) if self._fake.classes is None else (self._shape[0], self._fake.classes)

    def set_tensor_address(self, name: str, address: int, /) -> bool:
        self._address[name] = address
        return True

    def execute_async_v3(self, stream: int, /) -> bool:
        given, made = (tensor.name for tensor in self._engine._tensors)
        count = int(np.prod(self._shape))
        x = np.ctypeslib.as_array(ctypes.cast(self._address[given], ctypes.POINTER(ctypes.c_float)), (count,))
        out = np.ascontiguousarray(self._engine._session.run(None, {given: x.reshape(self._shape).copy()})[0])
        ctypes.memmove(self._address[made], out.ctypes.data, out.nbytes)
        return not self._fake.run_fails


class Runtime(Recorded):
    engine_host_code_allowed = False

    def __init__(self, fake: Fake, handle: Any) -> None:
        super().__init__(fake)
        fake.runtime = self

    def deserialize_cuda_engine(self, plan: bytes, /) -> Any:
        if self._fake.load_fails:
            return None
        sizes, _, data = plan[64:].partition(b"\n")
        return ICudaEngine(self._fake, tuple(json.loads(sizes)), data)


class Fake:
    """The module: `tensorrt` or `tensorrt_rtx` of a version, and switches that make it fail."""

    TF32 = 5

    def __init__(self, kind: str = "trt", version: str = "10.3.0", classes: int | None = None) -> None:
        self.kind, self.version, self.classes = kind, version, classes
        self.strongly_typed = 1 if version.startswith("10.") else 0
        self.touched: Touched = set()
        self.batches: list[int] = []
        self.refuse, self.takes_profile, self.dtype = "", True, 0
        self.build_fails = self.load_fails = self.run_fails = False
        self.config: Any = None
        self.runtime: Any = None
        self.runtime_config: Any = None
        names: dict[str, dict[str, int]] = {
            "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": self.strongly_typed},
            "BuilderFlag": {"TF32": self.TF32, "VERSION_COMPATIBLE": 6, "GPU_FALLBACK": 7},
            "MemoryPoolType": {"WORKSPACE": 0},
            "HardwareCompatibilityLevel": {"NONE": 0, "AMPERE_PLUS": 1},
            "DeviceType": {"GPU": 0, "DLA": 1},
            "DataType": {"FLOAT": 0, "HALF": 1},
            "TensorIOMode": {"NONE": 0, "INPUT": 1, "OUTPUT": 2},
        }
        if kind == "rtx":
            names["ComputeCapability"] = {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM86": 86, "SM89": 89}
            names["DynamicShapesKernelSpecializationStrategy"] = {"LAZY": 0, "EAGER": 1}
            names["CudaGraphStrategy"] = {"DISABLED": 0}
        self.module = self._module(names)

    def _module(self, names: dict[str, dict[str, int]]) -> Any:
        made: dict[str, Any] = {title: Names(self, title, **members) for title, members in names.items()}
        made |= {c.__name__: (lambda *args, c=c: c(self, *args)) for c in (Builder, OnnxParser, Runtime)}
        return SimpleNamespace(__version__=self.version, ILogger=ILogger, **made)

    def plan(self, data: bytes, sizes: tuple[int, ...]) -> bytes:
        """A plan: the header as the real ones have it, the profile, the graph."""
        parts = [int(part) for part in f"{self.version}.0".split(".")[:4]]
        head = (b"vtrt" if self.kind == "rtx" else b"ftrt").ljust(24, b"\0") + bytes(parts)
        mask = struct.pack("<I", 0x7E if self.kind == "rtx" else 0)
        return (head + b"\0" * 4 + mask).ljust(64, b"\0") + json.dumps(sizes).encode() + b"\n" + data


class HostDevice:
    """Memory of the host in the place of a GPU's."""

    stream = 7

    def __init__(self) -> None:
        self._buffers: list[Any] = []
        self.closed = False

    def activate(self) -> None:
        pass

    def allocate(self, nbytes: int) -> int:
        self._buffers.append(np.zeros(nbytes, np.uint8))
        return int(self._buffers[-1].ctypes.data)

    def upload(self, address: int, values: Any) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def download(self, values: Any, address: int) -> None:
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def close(self) -> None:
        self.closed = True


def platform(fake: Fake, gpu: Gpu = ORIN, **changes: Any) -> Platform:
    """A machine with the fake library and a GPU that is none."""
    told: dict[str, Any] = {
        "probe": lambda: Driver("12.6", (gpu,)),
        "library": lambda kind: fake.module,
        "device": HostDevice,
        "first_load": lambda *args, **more: None,
        "fake": True,
    }
    return Platform(**told | changes)


def rtx_installed() -> bool:
    """Whether the real TensorRT-RTX is here."""
    return installed("rtx")
