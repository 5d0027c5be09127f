"""The CUDA driver through ctypes, on a library compiled here that keeps a GPU's memory in the host's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from robustkd.engines._driver import Device, Gpu, probe
from robustkd.engines.trt import TrtEngine
from robustkd.errors import RequirementError
from tests.fake_tensorrt import ADA, Fake, platform
from tests.native import compiled
from tests.unit.onnx_graphs import CLASSES, images, linear


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compiled("fake_cuda.c", tmp_path_factory.mktemp("cuda") / "libcuda.so"))


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    probe.cache_clear()


def test_what_the_driver_says(cuda: str) -> None:
    found = probe(cuda)
    assert (found.cuda, found.gpus, found.reason) == ("12.8", (Gpu("Fake GPU", "sm89"),), "")


def test_no_driver_no_start_no_gpu(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "libnothing.so is not found" in probe("libnothing.so").reason
    monkeypatch.setenv("FAKE_CUDA_FAILS", "1")
    assert "cuInit answers 999" in probe(cuda).reason
    probe.cache_clear()
    monkeypatch.delenv("FAKE_CUDA_FAILS")
    monkeypatch.setenv("FAKE_CUDA_EMPTY", "1")
    assert probe(cuda).reason == "the NVIDIA driver sees no GPU" and probe(cuda).gpus == ()
    with pytest.raises(RequirementError, match="sees no GPU"):
        Device(cuda)


def test_memory_goes_there_and_back_and_is_freed(cuda: str) -> None:
    alive = ctypes.CDLL(cuda).fake_buffers_alive
    device = Device(cuda)
    assert device.gpu == Gpu("Fake GPU", "sm89") and device.stream
    values = np.arange(12, dtype=np.float32)
    address, other = device.allocate(values.nbytes), device.allocate(4)
    assert address != other and alive() == 2
    device.upload(address, values)
    back = np.zeros_like(values)
    device.download(back, address)
    np.testing.assert_array_equal(back, values)
    device.close()
    device.close()
    assert alive() == 0


def test_too_much_memory_is_an_error_with_advice(cuda: str) -> None:
    device = Device(cuda)
    with pytest.raises(RequirementError, match="cuMemAlloc_v2 answers 2") as caught:
        device.allocate(1 << 50)
    assert "smaller batch" in caught.value.fix
    device.close()


def test_an_engine_over_the_real_calls(cuda: str, tmp_path: Path) -> None:
    made = Fake("trt", classes=CLASSES)
    plan = tmp_path / "m.engine"
    plan.write_bytes(made.plan(linear().SerializeToString(), (1, 4, 8)))
    here = platform(made, ADA, device=lambda: Device(cuda))
    weight = np.random.default_rng(0).normal(size=(50, CLASSES)).astype(np.float32)
    with TrtEngine(plan, trust=True, platform=here) as engine:
        x = images(19)
        np.testing.assert_allclose(engine.logits(x), x.reshape(19, -1) @ weight, rtol=1e-4, atol=1e-4)
    assert ctypes.CDLL(cuda).fake_buffers_alive() == 0
