"""Our TensorRT code against NVIDIA's real Python bindings: what it touches is there in 10.3, 10.13 and 11.4.

The fake library records every attribute that our builder and engine read or set. A child process imports the real bindings,
with empty libraries in the place of TensorRT itself, and says which of them each version has. This shows that we call an
API that exists; it does not show that it runs.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from robustkd.engines.rtx import RtxEngine
from robustkd.engines.trt import TrtEngine
from robustkd.exporting.trt.builder import build
from robustkd.recipe.target import EngineOptions
from tests.conftest import ROOT
from tests.fake_tensorrt import ADA, ORIN, Fake, platform, rtx_installed
from tests.native import compiled
from tests.unit.onnx_graphs import CLASSES, images, linear

VERSIONS = ("10.3.0", "10.13.3.9", "11.4.0.106")
OURS = [ROOT / "robustkd" / "engines" / f"_{name}.py" for name in ("session", "tensorrt", "runtime_cache")]
OURS += [ROOT / "robustkd" / "exporting" / "trt" / f"{name}.py" for name in ("builder", "engine")]
#: gone from TensorRT 11, or never strongly typed
REMOVED = {
    *("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "EXPLICIT_BATCH"),
    *("int8_calibrator", "set_quantization_flag", "dynamic_range", "set_output_type", "algorithm_selector"),
    *("set_calibration_profile", "platform_has_fast_fp16", "platform_has_fast_int8", "has_implicit_batch_dimension"),
    *("device_memory_size", "supports_model", "build_engine", "execute_async_v2", "get_binding_shape", "num_bindings"),
}

CHILD = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
found = {}
for title, name in json.loads(sys.stdin.read()):
    kind = getattr(trt, title, None)
    found[f"{title}.{name}"] = kind is not None and (hasattr(kind, name) or name in getattr(kind, "__members__", {}))
print(json.dumps({"version": trt.__version__, "found": found, "typed": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)}))
"""


def touched(kind: str, tmp_path: Path) -> set[tuple[str, str]]:
    """Everything that a build with all options, a refused one and a run on every path touch."""
    fake = Fake("rtx" if kind == "rtx" else "trt", classes=CLASSES)
    here = platform(fake, ADA if kind == "rtx" else ORIN)
    options: dict[str, Any] = {"level": 2, "workspace_mib": 64}
    if kind == "rtx":
        options["capabilities"] = ("sm86", "sm89")
    else:
        cache = str(tmp_path / "cache")
        options |= {"version_compatible": True, "hardware_compatible": "ampere_plus", "dla": 1, "timing_cache": cache}
    for tf32 in (False, True):
        plan = _build(fake, EngineOptions(tf32=tf32, **options))
    fake.refuse = "an operator"
    with pytest.raises(Exception, match="refuses the graph"):
        _build(fake, EngineOptions())
    (tmp_path / "m.engine").write_bytes(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTKD_RTX_CACHE", str(tmp_path / "kernels"))
        for _ in range(2):  # the second time with what the first has kept
            with (RtxEngine if kind == "rtx" else TrtEngine)(tmp_path / "m.engine", trust=True, platform=here) as engine:
                engine.logits(images(3))
    assert kind != "rtx" or ("IRuntimeCache", "deserialize") in fake.touched
    return fake.touched


def _build(fake: Fake, options: EngineOptions) -> bytes:
    from robustkd.engines._tensorrt import log_of

    kind: Any = fake.kind
    return build(fake.module, log_of(fake.module), linear().SerializeToString(), kind, options).plan


def _asked(module: str, wanted: set[tuple[str, str]], **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, module],
        input=json.dumps(sorted(wanted)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one folder per version; from ROBUSTKD_TEST_TENSORRT, else installed into a throw-away place."""
    given = os.environ.get("ROBUSTKD_TEST_TENSORRT")
    return Path(given) if given else tmp_path_factory.mktemp("tensorrt")


def _wheel(folder: Path, version: str) -> Path:
    goal = folder / version
    if not goal.exists():
        if util.find_spec("pip") is None:
            pytest.skip("no pip to install the bindings with; name a folder of them in ROBUSTKD_TEST_TENSORRT")
        command = [
            "install",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--target",
            str(goal),
            f"tensorrt-cu12-bindings=={version}",
        ]
        done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"no bindings of TensorRT {version} for this Python from the package index: {last[:120]}")
    return goal


def _stubs(folder: Path, version: str) -> Path:
    major, goal = version.partition(".")[0], folder / f"stubs-{version.partition('.')[0]}"
    if not goal.exists():
        goal.mkdir()
        for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
            compiled("stub_nvinfer.c", goal / f"{name}.so.{major}", f"-Wl,-soname,{name}.so.{major}")
    return goal


@pytest.mark.parametrize("version", VERSIONS)
def test_what_we_touch_exists_in_the_real_bindings(
    version: str, bindings: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stubs = _stubs(tmp_path, version)
    wheel = _wheel(bindings, version)
    wanted = touched("trt", tmp_path)
    said = _asked("tensorrt_bindings", wanted, PYTHONPATH=str(wheel), LD_LIBRARY_PATH=str(stubs))
    assert said["version"] == version
    assert {name for name, there in said["found"].items() if not there} == set()
    assert len(wanted) > 40, "the fake saw the whole of our code"
    # the number of the flag moved, which is why the builder never writes it down
    assert said["typed"] == (0 if version.startswith("11.") else 1)
    gone = _asked("tensorrt_bindings", {("BuilderFlag", "FP16")}, PYTHONPATH=str(wheel), LD_LIBRARY_PATH=str(stubs))
    assert gone["found"]["BuilderFlag.FP16"] is not version.startswith("11.")


@pytest.mark.rtx
@pytest.mark.skipif(not rtx_installed(), reason="TensorRT-RTX is not installed: pip install 'robustkd[rtx]'")
def test_what_we_touch_exists_in_tensorrt_rtx(tmp_path: Path) -> None:
    said = _asked("tensorrt_rtx", touched("rtx", tmp_path))
    assert {name for name, there in said["found"].items() if not there} == set()


def _chains(file: Path) -> set[tuple[str, str]]:
    """`trt.Something.NAME` as our source writes it."""
    tree = ast.parse(file.read_text())
    inner = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Attribute)]
    named = [(n.value, n.attr) for n in inner if isinstance(n.value, ast.Attribute)]
    return {(v.attr, a) for v, a in named if (isinstance(v.value, ast.Name) and v.value.id in ("trt",)) or _self_trt(v)}


def _self_trt(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Attribute) and node.value.attr == "_trt"


def test_the_fake_saw_every_name_in_our_source(tmp_path: Path) -> None:
    (tmp_path / "rtx").mkdir()
    seen = touched("trt", tmp_path) | touched("rtx", tmp_path / "rtx")
    written = {pair for file in OURS for pair in _chains(file) if not pair[1].startswith("__")}
    assert written and written <= seen


def test_nothing_that_was_removed_is_written() -> None:
    for file in OURS:
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & REMOVED, file.name
