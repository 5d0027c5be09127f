"""Several audits on one page: size, measured latency and robust accuracy of each target, in a table and a drawing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from robustkd import reporting
from robustkd.auditing.latency import LEAST, latency, with_speed
from robustkd.engines._base import EngineInfo
from robustkd.reporting import ReportInput
from robustkd.result import AuditResult, Latency, Timing
from tests.unit.audit_samples import result
from tests.unit.test_reporting import Page


def timed(path: str, ms: float, *, cpu: str = "A CPU", size: int | None = 2_500_000, status: str = "pass") -> AuditResult:
    timings = tuple(Timing(batch=b, runs=50, p50=ms * b, p95=ms * b, p99=ms * b, images_per_second=1e3 / ms) for b in (1, 32))
    plain = result(status, path=path)  # type: ignore[arg-type]
    speed = Latency(hardware={"cpu": cpu, "cores": 4}, load_average=0.1, timings=timings)
    return plain.model_copy(update={"artifact": plain.artifact.model_copy(update={"size": size}), "latency": speed})


def shown(*results: AuditResult) -> tuple[Page, str]:
    """The page, and the markup of the part with all targets."""
    text = reporting.render([ReportInput(one) for one in results])
    page = Page(text)
    assert "Targets side by side" in page.text
    return page, text[text.index("Targets side by side") : text.index("<article")]


def labels(part: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", part)


def cells(part: str, row: str) -> list[str]:
    found = next(r for r in re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL) if row in r)
    return [re.sub(r"<[^>]*>", " ", c).strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", found, re.DOTALL)]


def test_three_targets_in_table_and_drawing() -> None:
    names = ("cpu-fp32", "cpu-int8", "rtx-fp16")
    page, part = shown(*(timed(f"runs/demo/{name}/model.onnx", ms) for name, ms in zip(names, (4.0, 1.25, 0.5), strict=True)))
    for name in names:
        assert name in labels(part)
    assert cells(part, "cpu-int8")[-3:] == ["2.50 MB", "1.25 ms", "800   batch 32"]
    assert {1.25, 4.0, 0.5, 2_500_000} <= set(page.figures)
    assert cells(part, "cpu-int8")[3].split() == ["73.2", "%", "68.8", "to", "77.3", "%"]
    assert "latency at batch 1, ms (median)" in labels(part) and "A CPU, 4 cores" in part
    assert "different machines" not in part and "Not drawn" not in part
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_result_without_latency_has_dashes_and_is_named() -> None:
    old = result(path="runs/demo/old/model.onnx")
    assert AuditResult.model_validate_json(old.model_dump_json(by_alias=True, exclude={"latency"})) == old
    _, part = shown(old, timed("runs/demo/new/model.onnx", 2.0))
    assert cells(part, "old")[-3:] == ["–", "–", "–"]
    assert "old" not in labels(part) and "new" in labels(part)
    assert re.search(r"Not drawn, because it was not measured: old\.", part)


def test_size_takes_the_place_of_latency_where_more_is_known_of_it() -> None:
    sized = timed("runs/demo/a/model.onnx", 1.0).model_copy(update={"latency": None})
    _, part = shown(sized, timed("runs/demo/b/model.onnx", 2.0))
    assert "size of the file, MB" in labels(part) and {"a", "b"} <= set(labels(part))


def test_nothing_measured_draws_nothing_and_one_audit_has_no_such_part() -> None:
    _, part = shown(result(path="runs/demo/a/model.onnx"), result(path="runs/demo/b/model.onnx"))
    assert "<figure" not in part and "Latency is" not in part
    assert "side by side" not in reporting.render([ReportInput(timed("runs/demo/a/model.onnx", 1.0))])


def test_other_machines_and_untrusted_audits_are_named() -> None:
    _, part = shown(timed("a/m.onnx", 1.0), timed("b/m.onnx", 2.0, cpu="B CPU", status="invalid"))
    assert "A CPU, 4 cores (a)" in part and "B CPU, 4 cores (b)" in part
    assert "different machines" in part and "Hollow points" in part


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><b>', "$\\frac$", "é\u4e2d\x01", "{{ 7*7 }}"])
def test_hostile_names_are_text(evil: str) -> None:
    page, part = shown(timed(f"{evil}/{evil}.onnx", 1.0, cpu=evil), timed(f"{evil}/b.onnx", 2.0), timed("c/b.onnx", 2.0))
    assert {"script", "b"} & {tag for tag, _ in page.tags} == set()
    assert evil in page.text and "<script" not in part


def test_names_tell_targets_apart() -> None:
    _, part = shown(timed("x/cpu/model.onnx", 1.0), timed("y/cpu/model.onnx", 1.0))
    assert {"x/cpu/model.onnx", "y/cpu/model.onnx"} <= set(labels(part))
    same = timed("cpu/model.onnx", 1.0)
    assert {"cpu/model.onnx (1)", "cpu/model.onnx (2)"} <= set(labels(shown(same, same)[1]))


class Clocked:
    """An engine for one pixel that takes a given time per image, on a clock of its own."""

    def __init__(self, seconds: float, *, runtime: str = "onnxruntime", most: int | None = None) -> None:
        self.seconds, self.now = seconds, 0.0
        self.info = EngineInfo(
            runtime=runtime,
            runtime_version="1",
            precision="fp32",
            device="CPU",
            input_shape=(1, 1, 1),
            classes=2,
            max_batch=most,
        )

    def logits(self, x: np.ndarray) -> np.ndarray:
        self.now += self.seconds * len(x)
        return np.zeros((len(x), 2), np.float32)

    def __enter__(self) -> Clocked:
        return self

    def __exit__(self, *_: object) -> None:
        return None


X = np.zeros((3, 1, 1, 1), np.float32)


@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, 200), (0.25, LEAST)])
def test_latency_is_that_of_the_calls_and_ends_in_time(seconds: float, calls: int) -> None:
    engine = Clocked(seconds)
    one, many = latency(engine, X, clock=lambda: engine.now).timings
    assert (one.batch, many.batch, one.runs) == (1, 32, calls)
    assert one.p50 == pytest.approx(1e3 * seconds) and many.p99 == pytest.approx(32e3 * seconds)
    assert many.images_per_second == pytest.approx(1 / seconds)
    assert engine.now < 1.5 + 33 * (LEAST + 2) * seconds


def test_no_batch_is_larger_than_the_engine_takes() -> None:
    assert [t.batch for t in latency(Clocked(1e-3, most=8), X).timings] == [1, 8]
    assert [t.batch for t in latency(Clocked(1e-3, most=1), X).timings] == [1]


def test_what_is_random_or_a_stand_in_is_not_timed(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"12345")
    given = result(path=str(file))
    found = with_speed(given, Clocked(1e-3), X)
    assert found.artifact.size == 5 and found.latency is not None and found.latency.hardware["cores"]
    assert with_speed(given, Clocked(1e-3), X, stochastic=True).latency is None
    assert with_speed(given, Clocked(1e-3, runtime="fake-tensorrt"), X).latency is None
