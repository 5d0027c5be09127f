"""TensorRT engines on a fake library: what is refused before anything loads, how batches are cut, what info says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustkd.bundle import create
from robustkd.engines import _driver
from robustkd.engines._driver import Driver
from robustkd.engines._first_load import first_load
from robustkd.engines._open import open_engine
from robustkd.engines.ort import OrtEngine
from robustkd.engines.rtx import RtxEngine
from robustkd.engines.trt import TrtEngine
from robustkd.errors import ArtifactError, RequirementError
from tests.fake_tensorrt import ADA, ORIN, Fake, HostDevice, platform
from tests.unit.onnx_graphs import CLASSES, images, linear, save


def fake(kind: str = "trt", version: str = "10.3.0") -> Fake:
    return Fake(kind, version, classes=CLASSES)


def engine_bundle(folder: Path, made: Fake, sizes: tuple[int, int, int] = (1, 4, 6), **facts: Any) -> Path:
    """An engine bundle as export leaves it; the plan's path."""
    told = {"kind": made.kind, "builder_version": made.version, "batch": list(sizes), **facts}
    with create(folder / "e", "engine", precision="fp16", engine=told) as (work, _):
        (work / "model.engine").write_bytes(made.plan(linear().SerializeToString(), sizes))
        save(linear(), work)
    return folder / "e" / "model.engine"


@pytest.fixture(params=["trt", "rtx"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ENGINES: dict[str, Any] = {"trt": TrtEngine, "rtx": RtxEngine}


def test_logits_are_those_of_the_graph_however_many_images(kind: str, tmp_path: Path) -> None:
    made = fake(kind)
    plan = engine_bundle(tmp_path, made, (2, 4, 6))
    with ENGINES[kind](plan, platform=platform(made, ADA)) as engine, OrtEngine(plan.parent / "model.onnx") as reference:
        made.batches.clear()
        for n in (0, 1, 3, 5, 13):
            np.testing.assert_allclose(engine.logits(images(n)), reference.logits(images(n)), rtol=1e-5)
    assert made.batches == [2, 4, 6, 6, 6, 2], "padded up to the profile's smallest, never beyond its largest"


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    made = fake()
    with create(tmp_path / "e", "engine", engine={"kind": "trt", "builder_version": "10.3.0"}) as (work, _):
        (work / "model.engine").write_bytes(made.plan(linear(batch=4).SerializeToString(), (0, 0, 0)))
    with TrtEngine(tmp_path / "e" / "model.engine", platform=platform(made)) as engine:
        assert engine.info.max_batch == 4 and engine.logits(images(5)).shape == (5, CLASSES)
    assert set(made.batches) == {4}


def test_info_says_what_ran(kind: str, tmp_path: Path) -> None:
    made = fake(kind)
    info = ENGINES[kind](engine_bundle(tmp_path, made, tf32=False), platform=platform(made, ADA)).info
    assert info.runtime == {"trt": "fake-tensorrt", "rtx": "fake-tensorrt-rtx"}[kind] and info.runtime_version == "10.3.0"
    assert (info.precision, info.device, info.classes, info.max_batch) == ("fp16", ADA.name, CLASSES, 6)
    assert info.settings["capability"] == "sm89" and info.settings["tf32"] is False and info.settings["batch"] == [1, 4, 6]


def test_rtx_compiles_before_use_and_captures_nothing(tmp_path: Path) -> None:
    made = fake("rtx")
    info = RtxEngine(engine_bundle(tmp_path, made), platform=platform(made, ADA)).info
    config = made.runtime_config
    assert (config.dynamic_shapes_kernel_specialization_strategy, config.cuda_graph_strategy) == (1, 0)
    assert info.settings["kernels"] == "eager" and info.settings["cuda_graphs"] is False


def test_rtx_keeps_what_it_compiled_and_drops_what_is_of_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKD_RTX_CACHE", str(tmp_path / "kernels"))
    made = fake("rtx")
    plan = engine_bundle(tmp_path, made)
    with RtxEngine(plan, platform=platform(made, ADA)):
        assert not (tmp_path / "kernels").exists()
    (kept,) = (tmp_path / "kernels").iterdir()
    assert kept.read_bytes() == b"kernels of this GPU" and kept.stem in made_digest(plan)
    again = fake("rtx")
    with RtxEngine(plan, platform=platform(again, ADA)):
        assert again.runtime_config._cache._data == b"kernels of this GPU"
    kept.write_bytes(b"of another GPU")
    other = fake("rtx")
    with RtxEngine(plan, platform=platform(other, ADA)) as engine:
        assert other.runtime_config._cache._data == b"" and engine.logits(images(2)).shape == (2, CLASSES)
    assert kept.read_bytes() == b"kernels of this GPU"
    monkeypatch.setenv("ROBUSTKD_RTX_CACHE", "")
    without = fake("rtx")
    with RtxEngine(plan, platform=platform(without, ADA)):
        assert without.runtime_config._cache is None


def made_digest(plan: Path) -> str:
    from robustkd.bundle import sha256

    return sha256(plan)


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ROBUSTKD_RTX_CACHE", str(tmp_path / "file" / "kernels"))
    made = fake("rtx")
    with RtxEngine(engine_bundle(tmp_path, made), platform=platform(made, ADA)) as engine:
        assert engine.logits(images(2)).shape == (2, CLASSES)


def test_leaving_frees_the_device(tmp_path: Path) -> None:
    made, device = fake(), HostDevice()
    with TrtEngine(engine_bundle(tmp_path, made), platform=platform(made, device=lambda: device)):
        assert not device.closed
    assert device.closed


class TestRefusals:
    def test_no_gpu_says_where_to_go(self, kind: str, tmp_path: Path) -> None:
        made = fake(kind)
        plan = engine_bundle(tmp_path, made, capabilities=["sm86", "sm89"])
        with pytest.raises(RequirementError, match=r"cannot run a TensorRT.* engine: no driver here") as caught:
            ENGINES[kind](plan, platform=platform(made, probe=lambda: Driver(None, (), "no driver here")))
        assert "sm86 or sm89" in caught.value.fix and str(plan.parent / "model.onnx") in caught.value.fix

    def test_the_driver_is_asked_before_the_library(self, tmp_path: Path) -> None:
        def never(kind: str) -> Any:
            raise AssertionError("the library was touched")

        made = fake()
        nothing = platform(made, probe=lambda: Driver(None, (), "none"), library=never)
        with pytest.raises(RequirementError):
            TrtEngine(engine_bundle(tmp_path, made), platform=nothing)

    def test_nobody_vouches(self, kind: str, tmp_path: Path) -> None:
        made, file = fake(kind), tmp_path / "found.engine"
        file.write_bytes(made.plan(linear().SerializeToString(), (1, 4, 6)))
        with pytest.raises(ArtifactError, match="no manifest vouches for this engine") as caught:
            ENGINES[kind](file, platform=platform(made, ADA))
        assert "--trust-engine" in caught.value.fix
        assert ENGINES[kind](file, trust=True, platform=platform(made, ADA)).info.classes == CLASSES

    def test_a_manifest_beside_it_that_lists_other_files_vouches_for_nothing(self, tmp_path: Path) -> None:
        made = fake()
        plan = engine_bundle(tmp_path, made)
        other = plan.with_name("other.engine")
        other.write_bytes(plan.read_bytes())
        with pytest.raises(ArtifactError, match="no manifest vouches"):
            TrtEngine(other, platform=platform(made))

    def test_one_flipped_byte(self, tmp_path: Path) -> None:
        made = fake()
        plan = engine_bundle(tmp_path, made)
        data = bytearray(plan.read_bytes())
        data[-5] ^= 1
        plan.write_bytes(data)
        for trust in (False, True):
            with pytest.raises(ArtifactError, match="digest differs"):
                TrtEngine(plan, trust=trust, platform=platform(made))

    def test_code_inside_a_plan_runs_only_with_trust(self, tmp_path: Path) -> None:
        made = fake()
        plan = engine_bundle(tmp_path, made, version_compatible=True)
        with pytest.raises(ArtifactError, match="holds code that runs on this machine"):
            TrtEngine(plan, platform=platform(made))
        TrtEngine(plan, trust=True, platform=platform(made))
        assert made.runtime.engine_host_code_allowed is True
        made = fake()
        TrtEngine(engine_bundle(tmp_path / "b", made), platform=platform(made))
        assert made.runtime.engine_host_code_allowed is False

    @pytest.mark.parametrize("here", ["10.13.3.9", "10.2.0", "11.4.0.106"])
    def test_another_version(self, here: str, kind: str, tmp_path: Path) -> None:
        plan, now = engine_bundle(tmp_path, fake(kind)), fake(kind, here)
        with pytest.raises(
            RequirementError, match=f"was built by TensorRT.* 10.3.0, and TensorRT.* {here} is installed"
        ) as caught:
            ENGINES[kind](plan, platform=platform(now, ADA))
        assert f"robustkd export e --{kind}" in caught.value.fix

    def test_a_version_compatible_engine_runs_on_later_versions_only(self, tmp_path: Path) -> None:
        plan = engine_bundle(tmp_path, fake(version="10.13.3.9"), version_compatible=True)
        assert TrtEngine(plan, trust=True, platform=platform(fake(version="11.4.0.106"))).info.runtime_version == "11.4.0.106"
        with pytest.raises(RequirementError, match=r"10\.3\.0 is installed"):
            TrtEngine(plan, trust=True, platform=platform(fake()))

    def test_another_gpu(self, kind: str, tmp_path: Path) -> None:
        made = fake(kind)
        plan = engine_bundle(tmp_path, made, capabilities=["sm86"])
        with pytest.raises(RequirementError, match=r"was built for sm86, and this machine has Orin \(fake\) \(sm87\)"):
            ENGINES[kind](plan, platform=platform(made, ORIN))

    @pytest.mark.parametrize(
        "facts", [{"capabilities": ["sm86"], "hardware_compatible": "ampere_plus"}, {"capabilities": ["sm80", "newer"]}]
    )
    def test_gpus_that_were_allowed_for(self, facts: dict[str, Any], tmp_path: Path) -> None:
        made = fake()
        assert TrtEngine(engine_bundle(tmp_path, made, **facts), platform=platform(made, ADA)).info.device == ADA.name

    def test_the_other_kind_of_plan(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="a plan of TensorRT-RTX, not of TensorRT"):
            TrtEngine(engine_bundle(tmp_path, fake("rtx")), platform=platform(fake()))

    @pytest.mark.parametrize(
        ("switch", "value", "says"),
        [
            ("load_fails", True, "it is not accepted"),
            ("run_fails", True, "it does not run"),
            ("dtype", 1, "images is not float32"),
        ],
    )
    def test_what_the_library_does_not_take(self, switch: str, value: Any, says: str, tmp_path: Path) -> None:
        made = fake()
        plan = engine_bundle(tmp_path, made)
        setattr(made, switch, value)
        with pytest.raises(ArtifactError, match=says):
            TrtEngine(plan, platform=platform(made))

    def test_the_librarys_own_words_come_first(self, tmp_path: Path) -> None:
        from types import SimpleNamespace

        from robustkd.engines._session import Session
        from robustkd.engines._tensorrt import log_of

        made = fake()
        plan = engine_bundle(tmp_path, made)
        made.load_fails = True

        class Speaking(type(made.module.Runtime(None))):  # type: ignore[misc]
            def deserialize_cuda_engine(self, data: bytes, /) -> None:
                log_of(made.module).handle.log(SimpleNamespace(name="ERROR"), "Version tag does not match\nmore")

        made.module.Runtime = lambda handle: Speaking(made, handle)
        with pytest.raises(ArtifactError, match="cannot be used here: Version tag does not match\n"):
            Session(made.module, "trt", plan, device=HostDevice())


class TestFirstLoad:
    """The child process."""

    def test_a_crash_is_an_error(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
        with pytest.raises(ArtifactError, match=r"loading m\.engine crashes: signal SIGSEGV") as caught:
            first_load("trt", tmp_path / "m.engine", trust=False, command=command)
        assert caught.value.fix

    def test_its_last_line_is_the_reason(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "print('noise'); print('no such GPU'); raise SystemExit(1)"]
        with pytest.raises(ArtifactError, match="does not load here: no such GPU"):
            first_load("rtx", tmp_path / "m.engine", trust=False, command=command)

    def test_ok(self, tmp_path: Path) -> None:
        first_load("rtx", tmp_path / "m.engine", trust=True, command=[sys.executable, "-c", "print('ok')"])

    def test_the_real_child_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"TensorRT is not installed here|NVIDIA driver|not accepted"):
            first_load("trt", tmp_path / "m.engine", trust=False)


class TestOpen:
    def test_the_tag_decides_not_the_name(self, kind: str, tmp_path: Path) -> None:
        file = tmp_path / "model.onnx"
        file.write_bytes(fake(kind).plan(b"", (1, 1, 1)))
        title = {"trt": "a TensorRT engine", "rtx": "a TensorRT-RTX engine"}[kind]
        if _driver.probe().gpus:
            pytest.skip("this machine has a GPU")
        with pytest.raises(RequirementError, match=f"cannot run {title}"):
            open_engine(file)

    def test_a_suffix_without_a_tag_is_no_plan(self, tmp_path: Path) -> None:
        (tmp_path / "m.engine").write_bytes(b"anything")
        with pytest.raises(ArtifactError, match="is no plan of TensorRT or TensorRT-RTX"):
            open_engine(tmp_path / "m.engine")
