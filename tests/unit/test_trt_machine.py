"""What this machine can build and run, which TensorRT `--trt` means, and what the looking commands say of engines."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from robustkd.bundle import Bundle, create
from robustkd.cli import doctor as doctor_module
from robustkd.engines import _open
from robustkd.engines._driver import Driver, Gpu, probe
from robustkd.engines._plan import parse_header
from robustkd.engines._tensorrt import check_version, library, log_of
from robustkd.engines.rtx import RtxEngine
from robustkd.engines.trt import TrtEngine
from robustkd.errors import ArtifactError, ConfigError, NumericsError, RequirementError
from robustkd.exporting.trt.builder import build
from robustkd.exporting.trt.bundle import build_bundle, engine_target, is_graph
from robustkd.exporting.trt.machine import Machine, ability, choose, tensorrt_facts, unsupported
from robustkd.recipe.target import EngineOptions, read_target
from robustkd.resources import shipped
from tests.conftest import Outcome
from tests.fake_tensorrt import ADA, ORIN, Fake, platform
from tests.unit.onnx_graphs import CLASSES, linear, quantized, save

Command = Callable[..., Outcome]
NOTHING = Machine(Driver(None, (), "there is no NVIDIA driver"), classic=False, rtx=False)
CPU = NOTHING._replace(rtx=True)
JETSON = Machine(Driver("12.6", (ORIN,)), classic=True, rtx=False)
GEFORCE = Machine(Driver("12.8", (ADA,)), classic=False, rtx=True)
H100 = Machine(Driver("12.8", (Gpu("H100", "sm90"),)), classic=False, rtx=True)
without_gpu = pytest.mark.skipif(bool(probe().gpus), reason="this machine has a GPU")


class TestChoose:
    @pytest.mark.parametrize(
        ("asked", "machine", "chosen"),
        [("trt", JETSON, "trt"), ("trt", GEFORCE, "rtx"), ("rtx", CPU, "rtx"), ("rtx", JETSON._replace(rtx=True), "rtx")],
    )
    def test_what_is_meant(self, asked: Any, machine: Machine, chosen: str) -> None:
        assert choose(asked, machine) == chosen

    @pytest.mark.parametrize("machine", [NOTHING, CPU, H100, JETSON._replace(classic=False, rtx=True)])
    def test_no_engine_here_names_the_command_for_the_device(self, machine: Machine) -> None:
        with pytest.raises(RequirementError, match="no TensorRT engine can be built here") as caught:
            choose("trt", machine, place="mine", precision="fp16")
        assert "--onnx --precision fp16 here" in caught.value.fix, "a board has no torch: it builds from ONNX"
        assert "run there: robustkd export BUNDLE --trt --precision fp16" in caught.value.fix
        with pytest.raises(RequirementError) as caught:
            choose("trt", machine, place="runs/a/m.onnx", precision="fp16")
        assert "copy m.onnx to the device and run there: robustkd export m.onnx --trt --precision fp16" in caught.value.fix

    def test_rtx_without_its_package(self) -> None:
        with pytest.raises(RequirementError, match="TensorRT-RTX is not installed") as caught:
            choose("rtx", NOTHING)
        assert caught.value.fix == "pip install 'robustkd[rtx]'"

    def test_a_target_for_another_gpu(self) -> None:
        with pytest.raises(RequirementError, match="it is for sm90, this is sm87"):
            choose("trt", JETSON, gpus=("sm90",))


@pytest.mark.parametrize(
    ("name", "machine", "builds", "runs"),
    [
        ("jetson-orin-fp16", JETSON, True, True),
        ("jetson-orin-int8", CPU, False, False),
        ("datacenter-fp16", JETSON, False, False),
        ("rtx-fp16", CPU, True, False),
        ("rtx-int8", GEFORCE, True, True),
        ("rtx-int8", NOTHING, False, False),
        ("rtx-fp16", H100, True, False),
        ("cpu-fp32", NOTHING, True, True),
    ],
)
def test_what_can_be_done_where(name: str, machine: Machine, builds: bool, runs: bool) -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    found = ability(read_target(name), machine)
    assert (not found.cannot_build, not found.cannot_run) == (builds, runs), found


@pytest.mark.parametrize("name", [n for n in shipped("target") if not n.startswith("cpu")])
def test_shipped_engine_targets_state_batch_and_needs(name: str) -> None:
    target = read_target(name)
    assert target.kind in ("trt", "rtx") and target.batch and target.needs
    assert target.engine.tf32 is False
    assert (
        "not verified on hardware" in (text := shipped("target")[name].read_text()) or "not been verified on hardware" in text
    )


class TestVersions:
    @pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "11.4.0.106"])
    def test_supported(self, version: str) -> None:
        check_version("trt", version)

    @pytest.mark.parametrize(
        ("kind", "version"), [("trt", "10.2.0"), ("trt", "8.6.1"), ("trt", "12.0"), ("rtx", "1.4.0"), ("trt", "")]
    )
    def test_refused(self, kind: Any, version: str) -> None:
        with pytest.raises(RequirementError, match="is not supported"):
            check_version(kind, version)

    def test_jetpack_and_rtx_gpus(self) -> None:
        assert unsupported("trt", "10.3.0", "sm87") == "" and "JetPack" in unsupported("trt", "11.4.0.106", "sm87")
        assert unsupported("rtx", "1.7.1.116", "sm89") == "" and "has no sm90" in unsupported("rtx", "1.7.1.116", "sm90")

    def test_a_library_that_does_not_import(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(name: str) -> Any:
            raise OSError("libnvinfer.so.10: cannot open shared object file\nmore")

        monkeypatch.setattr("robustkd.engines._tensorrt.import_module", broken)
        with pytest.raises(RequirementError, match="TensorRT is not installed here") as caught:
            library("trt")
        assert caught.value.where == "libnvinfer.so.10: cannot open shared object file" and "JetPack" in caught.value.fix


class TestBuilder:
    """On the fake library: what is set, and what is refused."""

    def test_the_options_reach_the_builder(self, tmp_path: Path) -> None:
        fake, cache = Fake("trt"), tmp_path / "cache"
        cache.write_bytes(b"earlier")
        told = EngineOptions(
            level=5,
            workspace_mib=256,
            version_compatible=True,
            hardware_compatible="ampere_plus",
            dla=1,
            timing_cache=str(cache),
        )
        plan = build(fake.module, log_of(fake.module), linear().SerializeToString(), "trt", told, batch=(2, 4, 8)).plan
        config = fake.config
        assert (config.builder_optimization_level, config._pools, config._sizes) == (5, {0: 256 << 20}, (2, 4, 8))
        assert config._flags == {6, 7}, "version compatible, fall back to the GPU, and no TF32, which is on by default"
        assert (config.hardware_compatibility_level, config.default_device_type, config.DLA_core) == (1, 1, 1)
        assert config._cache == b"earlier" and cache.read_bytes() == b"measured"
        assert parse_header(plan) == ("trt", "10.3.0.0", ())

    def test_tf32_on_request_only(self) -> None:
        fake = Fake("trt")
        build(fake.module, log_of(fake.module), linear().SerializeToString(), "trt", EngineOptions(tf32=True))
        assert fake.config._flags == {Fake.TF32}

    @pytest.mark.parametrize(
        ("kind", "options", "error", "says"),
        [
            ("rtx", {"dla": 0}, ConfigError, "TensorRT-RTX has no dla"),
            ("rtx", {"timing_cache": "x"}, ConfigError, "has no timing_cache"),
            ("rtx", {"version_compatible": True, "hardware_compatible": "ampere_plus"}, ConfigError, "and no hardware_comp"),
            ("trt", {"capabilities": ("sm86",)}, ConfigError, "TensorRT has no capabilities"),
            ("trt", {"dla": 2}, RequirementError, "no deep learning accelerator 2: this machine has 2"),
            ("trt", {"hardware_compatible": "same_compute_capability"}, RequirementError, "10.3.0 has no hardware compat"),
            ("rtx", {"capabilities": ("sm87",)}, RequirementError, "cannot build for sm87"),
        ],
    )
    def test_refused_options(self, kind: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
        fake = Fake(kind)
        with pytest.raises(error, match=says):
            build(fake.module, log_of(fake.module), linear().SerializeToString(), kind, EngineOptions(**options))

    @pytest.mark.parametrize(
        ("switch", "value", "error", "says"),
        [
            ("refuse", "shiftIsAllZeros(zeroPoint)", ArtifactError, "a zero point that is not 0"),
            ("refuse", "Weird failure", RequirementError, "refuses the graph: Weird failure"),
            ("build_fails", True, RequirementError, "it gives no reason"),
            ("takes_profile", False, ConfigError, "the batch 1:8:64 is not accepted"),
        ],
    )
    def test_what_the_library_refuses(self, switch: str, value: Any, error: type[Exception], says: str) -> None:
        fake = Fake("trt")
        setattr(fake, switch, value)
        with pytest.raises(error, match=says):
            build(fake.module, log_of(fake.module), linear().SerializeToString(), "trt", EngineOptions())

    def test_a_timing_cache_of_another_gpu(self, tmp_path: Path) -> None:
        fake, cache = Fake("trt"), tmp_path / "cache"
        cache.write_bytes(b"of another GPU")
        with pytest.raises(ArtifactError, match="belongs to another GPU"):
            build(fake.module, log_of(fake.module), linear().SerializeToString(), "trt", EngineOptions(timing_cache=str(cache)))


class TestBundle:
    """On a board: an onnx bundle becomes an engine bundle, and runs against its graph where there is a GPU."""

    @pytest.fixture
    def parent(self, tmp_path: Path) -> Path:
        with create(tmp_path / "run" / "cpu-fp32", "onnx", precision="fp32") as (work, _):
            save(linear(precision="fp32", max_batch="64"), work)
        return tmp_path / "run" / "cpu-fp32"

    def test_built_run_and_verified_on_the_board(self, parent: Path) -> None:
        fake = Fake("trt", classes=CLASSES)
        bundle = build_bundle(parent, engine_target("trt", "fp32"), machine=JETSON, platform=platform(fake))
        assert bundle.path == parent.parent.resolve() / "trt-fp32" and bundle.manifest.kind == "engine"
        facts = (bundle.manifest.model_extra or {})["engine"]
        assert facts["verified"] is True and facts["parity"]["images"] == "noise" and facts["parity"]["ok"]
        assert facts["gpu"] == {"name": ORIN.name, "capability": "sm87"} and facts["capabilities"] == ["sm87"]
        assert facts["builder_version"] == "10.3.0" and facts["kind"] == "trt"
        assert bundle.manifest.parent == Bundle.open(parent).digest
        with TrtEngine(bundle.file(".engine"), platform=platform(fake)) as engine:
            assert engine.info.classes == CLASSES

    def test_an_engine_that_computes_something_else_is_not_handed_over(self, parent: Path) -> None:
        fake = Fake("trt", classes=CLASSES)
        honest = fake.plan
        other = linear(seed=5).SerializeToString()
        fake.plan = lambda data, sizes: honest(other, sizes)  # type: ignore[method-assign]
        with pytest.raises(NumericsError, match="does not compute what its graph does on 64 images"):
            build_bundle(parent, engine_target("trt", "fp32"), machine=JETSON, platform=platform(fake))
        assert [folder.name for folder in parent.parent.iterdir()] == ["cpu-fp32"], "nothing is left behind"

    def test_an_engine_for_other_gpus_is_not_called_verified(self, parent: Path) -> None:
        fake = Fake("rtx", "1.7.1", classes=CLASSES)
        facts = build_bundle(parent, engine_target("rtx", "fp32"), machine=H100, platform=platform(fake)).manifest.model_extra
        assert facts is not None and facts["engine"]["verified"] is False
        assert facts["engine"]["reason"] == "it is not for this machine's sm90"

    def test_int8_is_not_made_without_images(self, parent: Path) -> None:
        with pytest.raises(ConfigError, match=r"the file is fp32, and the target trt-int8 is int8") as caught:
            build_bundle(parent, engine_target("trt", "int8"), machine=JETSON, platform=platform(Fake()))
        assert "--onnx --precision int8" in caught.value.fix

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"hello", "cut short, or not ONNX at all"),
            (linear().SerializeToString()[:300], "cut short"),
            (linear(shape=(50,)).SerializeToString(), "not one input of images"),
        ],
    )
    def test_files_that_are_no_graph(self, content: bytes, says: str, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(ArtifactError, match=says):
            build_bundle(tmp_path / "m.onnx", engine_target("trt", "fp32"), machine=JETSON, platform=platform(Fake()))

    def test_weights_in_another_file(self, tmp_path: Path) -> None:
        file = tmp_path / "m.onnx"
        onnx.save(linear(), file, save_as_external_data=True, size_threshold=0)
        with pytest.raises(ArtifactError, match="its weights lie in another file"):
            build_bundle(file, engine_target("trt", "fp32"), machine=JETSON, platform=platform(Fake()))

    def test_an_opset_of_the_future(self, tmp_path: Path) -> None:
        """TensorRT-RTX's own parser takes it, and reads the operators as those of an opset it knows."""
        model = linear()
        model.opset_import[0].version = 99
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match="it uses opset 99"):
            build_bundle(tmp_path / "m.onnx", engine_target("trt", "fp32"), machine=JETSON, platform=platform(Fake()))

    def test_what_is_a_graph(self, parent: Path, tmp_path: Path) -> None:
        with create(tmp_path / "checkpoint", "checkpoint"):
            pass
        assert is_graph(parent) and is_graph(parent / "model.onnx")
        assert not is_graph(tmp_path / "checkpoint") and not is_graph(tmp_path)

    def test_no_torch_is_imported(self) -> None:
        import subprocess
        import sys

        from tests.conftest import environment

        code = "import sys, robustkd.exporting.trt.bundle, robustkd.engines._open; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_headers_of_other_bytes() -> None:
    assert parse_header(b"") is None and parse_header(b"vtrt") is None and parse_header(b"PK\x03\x04" * 20) is None
    head = b"vtrt".ljust(24, b"\0") + bytes([1, 9, 0, 3]) + b"\0" * 4
    assert parse_header(head + struct.pack("<I", 0x0C)) == ("rtx", "1.9.0.3", ("sm86", "sm89"))
    assert parse_header(head + struct.pack("<I", 0xFFFF)) == ("rtx", "1.9.0.3", ()), "a mask of more than is known says nothing"


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    fake = Fake("rtx", "1.7.1.116")
    told = {"kind": "rtx", "builder_version": "1.7.1.116", "capabilities": ["sm86"], "verified": False, "reason": "no device"}
    with create(tmp_path / "e", "engine", precision="int8", engine=told) as (work, _):
        (work / "model.engine").write_bytes(fake.plan(quantized().SerializeToString(), (1, 2, 4)))
        save(quantized(), work)
    return tmp_path / "e" / "model.engine"


class TestCommands:
    def test_inspect_marks_what_the_header_says(self, engine_file: Path, command: Command) -> None:
        facts = json.loads(command("inspect", engine_file, "--json").stdout)
        assert facts["kind"] == "engine" and facts["vouched_for"] is True
        assert facts["from header"]["runtime"] == "TensorRT-RTX" and facts["from header"]["version"] == "1.7.1.116"
        assert facts["from manifest"]["precision"] == "int8" and facts["from manifest"]["verified"] is False
        out = command("inspect", engine_file).stdout
        assert "from header" in out and "from manifest" in out and "no device" in out

    def test_inspect_of_a_bare_plan_and_of_none(self, engine_file: Path, command: Command, tmp_path: Path) -> None:
        bare = tmp_path / "found.bin"
        bare.write_bytes(engine_file.read_bytes())
        facts = json.loads(command("inspect", bare, "--json").stdout)
        assert facts["vouched_for"] is False and "from manifest" not in facts
        (tmp_path / "text.engine").write_text("anything at all")
        code, _, err = command("inspect", "text.engine")
        assert code == 5 and "begins with neither's tag" in err

    @without_gpu
    def test_audit_without_a_gpu_is_4_and_says_what_to_do(self, engine_file: Path, command: Command) -> None:
        for given in (engine_file, engine_file.parent):
            code, out, err = command("audit", given)
            assert (code, out) == (4, "") and len(err.splitlines()) == 3
            assert "this machine cannot run a TensorRT-RTX engine" in err
            assert "copy the bundle to a machine with sm86" in err and "model.onnx" in err

    def test_audit_refuses_the_fake(self, engine_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = Fake("rtx", "1.7.1.116", classes=CLASSES)
        made = RtxEngine(engine_file, platform=platform(fake, Gpu("RTX 3090 (fake)", "sm86")))
        monkeypatch.setattr(_open, "open_engine", lambda path, **more: made)
        code, _, err = command("audit", engine_file, "--dataset", "synthetic", "--eps", "8/255")
        assert code == 5 and "fake-tensorrt-rtx is a stand-in for tests" in err

    def test_doctor_says_what_goes_with_what(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_module, "import_error", lambda module: None)
        machine = Machine(Driver("12.6", (ORIN,)), classic=True, rtx=False)
        monkeypatch.setattr("robustkd.exporting.trt.machine.installed", lambda kind: kind == "trt")
        monkeypatch.setattr("robustkd.exporting.trt.machine.installed_version", lambda kind: "11.4.0.106")
        monkeypatch.setattr("robustkd.exporting.trt.machine.this_machine", lambda: machine)
        found = json.loads(command("doctor", "--json").stdout)["tensorrt"]
        assert found["installed"] == {"TensorRT": "11.4.0.106"} and found["gpus"] == [ORIN._asdict()]
        assert "do not support JetPack" in found["support"][0]["why_not"]
        out = command("doctor").stdout
        assert "Orin (fake) (sm87): TensorRT 11.2 to 11.4 do not support JetPack" in out

    @without_gpu
    def test_doctor_without_a_gpu(self) -> None:
        facts = tensorrt_facts(NOTHING)
        assert facts["support"] == [] and facts["driver"]["reason"] == "there is no NVIDIA driver"

    @without_gpu
    def test_list_targets_says_what_is_possible_here(self, command: Command) -> None:
        code, out, err = command("list", "targets")
        lines = {line.split()[0]: line for line in out.splitlines()}
        assert code == 0 and "not built here" in lines["jetson-orin-fp16"] and "not run here" in lines["rtx-fp16"]
        assert "jetson-orin-fp16: TensorRT is not installed" in err or "NVIDIA driver" in err
