"""Timing: in turns, with a clock that the test holds; and the command, on files made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustkd.benchmarking.run import LEAST, measure
from robustkd.benchmarking.verb import bench
from robustkd.engines._base import EngineInfo
from robustkd.errors import ArtifactError
from tests.checkpoints import write_checkpoint
from tests.conftest import Outcome
from tests.unit.onnx_graphs import linear, quantized, save


class Clock:
    """Time that passes only when an engine runs."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def __call__(self) -> float:
        return self.now


class Slow:
    """An engine of known speed."""

    def __init__(self, clock: Clock, name: str, seconds: Callable[[int], float], device: str = "cpu") -> None:
        self.info = EngineInfo(
            runtime="test", runtime_version="0", precision="fp32", device=device, input_shape=(1, 2, 2), classes=2
        )
        self.clock, self.name, self.seconds, self.calls = clock, name, seconds, 0

    def logits(self, x: Any) -> Any:
        assert x.shape[1:] == (1, 2, 2) and x.dtype == np.float32 and 0 <= x.min() <= x.max() <= 1
        self.clock.now += self.seconds(self.calls)
        self.clock.order += self.name
        self.calls += 1
        return np.zeros((len(x), 2), np.float32)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def test_times_are_of_the_engine_in_turns_after_a_warm_up() -> None:
    clock = Clock()
    engines = {"a": Slow(clock, "a", lambda i: 5.0 if i < 3 else 0.010), "b": Slow(clock, "b", lambda i: 0.002)}
    told = measure(engines, 8, seconds=1.2, warmup=3, clock=clock)
    assert clock.order.startswith("aaabbb" + "aabb" * LEAST)
    a, b = told["a"], told["b"]
    assert (a.latency_ms.p50, a.latency_ms.p99) == pytest.approx((10, 10)) and b.latency_ms.p95 == pytest.approx(2)
    assert a.images_per_second == pytest.approx(800) and b.images_per_second == pytest.approx(4000)
    assert a.runs == b.runs == 100 and (a.batch, a.warmup) == (8, 3)
    assert b.speedup is not None and (b.speedup.estimate, b.speedup.best) == pytest.approx((5, 5))
    assert a.speedup is not None and a.speedup.estimate == pytest.approx(1)


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    clock = Clock()
    engines = {name: Slow(clock, name, lambda i, f=f: f * (1 + i / 10)) for name, f in (("a", 0.004), ("b", 0.001))}
    found = measure(engines, 1, seconds=0, warmup=0, clock=clock)["b"]
    assert found.speedup is not None and found.speedup.estimate == pytest.approx(4)
    assert found.runs == LEAST


def test_what_the_engine_before_left_behind_is_not_counted() -> None:
    """Every engine is slow on the first run of its turn, as one whose cores are still held by another's threads."""
    clock = Clock()
    engines = {name: Slow(clock, name, lambda i, f=f: f * (1 + 9 * (i % 2 == 0))) for name, f in (("a", 0.004), ("b", 0.001))}
    told = measure(engines, 1, seconds=0, warmup=0, clock=clock)
    assert told["a"].latency_ms.p99 == pytest.approx(4) and told["b"].latency_ms.p99 == pytest.approx(1)
    alone = Clock()
    measure({"a": Slow(alone, "a", lambda i: 0.001)}, 1, seconds=0, warmup=0, clock=alone)
    assert alone.order == "a" * LEAST


def test_cpu_time_is_compared_where_all_run_on_the_cpu() -> None:
    clock = Clock()
    engines = {"a": Slow(clock, "a", lambda i: 0.006), "b": Slow(clock, "b", lambda i: 0.002)}
    told = measure(engines, 1, seconds=0, warmup=0, clock=lambda: 2 * clock.now, cpu_clock=clock)
    assert (told["a"].cpu_ms, told["b"].cpu_ms) == pytest.approx((6, 2))
    assert told["b"].speedup is not None and told["b"].speedup.cpu == pytest.approx(3)
    engines["b"] = Slow(clock, "b", lambda i: 0.002, device="cuda:0")
    found = measure(engines, 1, seconds=0, warmup=0, clock=clock, cpu_clock=clock)["b"]
    assert found.speedup is not None and found.speedup.cpu is None and found.speedup.estimate == pytest.approx(3)


def test_percentiles_and_one_artifact_without_a_ratio() -> None:
    clock = Clock()
    told = measure({"a": Slow(clock, "a", lambda i: (i + 1) / 1000)}, 2, seconds=0, warmup=0, clock=clock)["a"]
    assert told.speedup is None
    assert (told.latency_ms.min, told.latency_ms.mean) == pytest.approx((1, 10.5))
    assert told.latency_ms.p50 == pytest.approx(10.5) and 19 < told.latency_ms.p95 < told.latency_ms.p99 <= 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "a" / "checkpoint").path.parent


def test_files_bundles_and_runs_say_what_they_are(run: Path, tmp_path: Path) -> None:
    told = bench([run, run / "checkpoint"], batches=(2,), seconds=0, warmup=0, threads=1)
    assert told["schema"] == "robustkd.bench/1" and told["machine"]["cores"]
    one, two = told["artifacts"]
    assert one["file"] == two["file"] and one["file"].endswith(".safetensors") and one["bytes"] > 0
    assert (one["runtime"], one["precision"], one["settings"]["threads"]) == ("pytorch", "fp32", 1)
    bare = bench([save(quantized(), tmp_path)], batches=(1, 3), seconds=0, warmup=0)["artifacts"][0]
    assert [t["batch"] for t in bare["timings"]] == [1, 3] and bare["settings"]["graph_optimization"] == "all"


def test_the_same_file_twice_is_measured_twice_and_other_images_are_refused(run: Path, tmp_path: Path) -> None:
    file = save(linear(), tmp_path)
    told = bench([file, file], batches=(1,), seconds=0, warmup=1)
    assert [a["artifact"] for a in told["artifacts"]] == [str(file), f"{file} again"]
    with pytest.raises(ArtifactError, match="takes images of shape"):
        bench([file, run], batches=(1,), seconds=0, warmup=0)


def test_int8_for_tensorrt_is_not_timed_on_a_cpu_without_a_word(tmp_path: Path) -> None:
    model = quantized()
    model.metadata_props.add(key="robustkd.int8_profile", value="trt")
    said: list[str] = []
    bench([save(model, tmp_path)], batches=(1,), seconds=0, warmup=0, say=said.append)
    assert any("slow on a CPU; for CPUs export --target cpu-int8" in line for line in said)


def test_table_and_json(command: Callable[..., Outcome], tmp_path: Path) -> None:
    file = save(linear(), tmp_path)
    code, out, err = command("bench", file, file, "--batch", "4,1", "--seconds", 0, "--warmup", 0)
    assert code == 0, err
    head, *rows = out.splitlines()
    assert head.split()[:2] == ["batch", "p50"] and [row.split()[0] for row in rows] == ["1", "1", "4", "4"]
    assert rows[0].split()[8] == "1.00x"
    code, out, _ = command("bench", file, "--seconds", 0, "--warmup", 0, "--json")
    assert code == 0 and [t["batch"] for t in json.loads(out)["artifacts"][0]["timings"]] == [1, 32]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["gone.onnx"], 5, "cannot read gone.onnx"),
        (["notes.onnx"], 5, "not a usable ONNX file"),
        ([], 2, "Missing argument"),
        (["notes.onnx", "--batch", "0"], 2, "is not a list of batch sizes"),
        (["notes.onnx", "--batch", "1,x"], 2, "is not a list of batch sizes"),
    ],
)
def test_what_is_refused(arguments: list[str], code: int, says: str, command: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "notes.onnx").write_text("these are notes")
    outcome = command("bench", *arguments)
    assert (outcome.code, outcome.stdout) == (code, "")
    assert says in outcome.stderr and len(outcome.stderr.splitlines()) == 3
