"""The NVIDIA driver through ctypes: which GPUs there are, and memory for an engine. Needs neither torch nor CUDA.

It is asked before any TensorRT library is touched: without a driver some of them end the process.
Names and signatures are those of the CUDA driver API, `cuda.h`.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustkd.errors import RequirementError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_FIX = "use a machine with an NVIDIA GPU and its driver; `robustkd doctor` says what is here"


class Gpu(NamedTuple):
    """A GPU; `capability` as in sm86."""

    name: str
    capability: str


class Driver(NamedTuple):
    """What the driver says. Without GPUs `reason` tells why."""

    cuda: str | None
    gpus: tuple[Gpu, ...]
    reason: str = ""


@lru_cache
def probe(library: str = LIBRARY) -> Driver:
    """The driver's CUDA version and its GPUs, or the reason why there are none; never fails, makes no context."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(None, (), f"there is no NVIDIA driver ({library} is not found)")
    if code := cuda.cuInit(0):
        return Driver(None, (), f"the NVIDIA driver does not start (cuInit answers {code})")
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Driver(version, (), "the NVIDIA driver sees no GPU")
    return Driver(version, tuple(_gpu(cuda, index) for index in range(count.value)))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


class Device:
    """The first GPU: one stream, and memory that is freed with `close`.

    The primary context is used, which torch shares; it is made current anew for each piece of work.

    Raises:
        RequirementError: the driver refuses.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        if not (found := probe(library)).gpus:
            raise RequirementError(found.reason, where=library, fix=_FIX)
        self.gpu, self.cuda = found.gpus[0], found.cuda
        self._lib = ctypes.CDLL(library)
        self._device, self._context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._buffers: list[int] = []
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.activate()
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))

    def _call(self, name: str, *args: Any) -> None:
        if code := getattr(self._lib, name)(*args):
            raise RequirementError(
                f"the NVIDIA driver refuses: {name} answers {code}",
                where=self.gpu.name,
                fix="free memory of the GPU or use a smaller batch" if code == 2 else _FIX,
            )

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return self._stream.value or 0

    def activate(self) -> None:
        """Make the context current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self._buffers.append(address.value)
        return address.value

    def upload(self, address: int, values: NDArray[np.float32]) -> None:
        """Copy a contiguous array to the GPU, in the stream's order."""
        source = ctypes.c_void_p(values.ctypes.data)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(values.nbytes), self._stream)

    def download(self, values: NDArray[np.float32], address: int) -> None:
        """Wait for the stream and fill a contiguous array from the GPU."""
        goal = ctypes.c_void_p(values.ctypes.data)
        self._call("cuMemcpyDtoHAsync_v2", goal, ctypes.c_uint64(address), ctypes.c_size_t(values.nbytes), self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if not self._context:
            return
        self.activate()
        while self._buffers:
            self._call("cuMemFree_v2", ctypes.c_uint64(self._buffers.pop()))
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._context = ctypes.c_void_p()
