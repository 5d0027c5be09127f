"""The report: figures equal those of result.json, nothing is loaded, everything is escaped, damage is refused."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from robustkd import reporting
from robustkd.cli.app import run as cli
from robustkd.errors import ArtifactError, RequirementError
from robustkd.reporting import ReportInput, numbers, pictures
from robustkd.reporting.curves import curves
from robustkd.result import AuditResult, Interval, Side
from tests.unit.audit_samples import N, audit_bundle, images, metrics, records, result


class Page(HTMLParser):
    """A page taken apart: figures, tags with attributes, ids, text; complains where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[float] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        if tag == "data":
            self.figures.append(float(dict(attrs)["value"] or "nan"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return audit_bundle(tmp_path / "runs" / "demo")


def _numbers(found: AuditResult) -> list[float]:
    """Every accuracy, limit and count of a result that the page has to show."""
    sides: list[Side] = [s for s in (found.engine, found.source_model) if s]
    spans: list[Interval] = [i for s in sides for i in (s.clean_accuracy, s.robust_accuracy)]
    spans += [found.difference.clean, found.difference.robust] if found.difference else []
    values = [v for i in spans for v in (i.estimate, i.low, i.high)]
    for attack in (a for s in sides for a in s.attacks.values()):
        values += [
            attack.robust_accuracy,
            attack.low,
            attack.high,
            attack.forward_calls,
            attack.seconds,
            attack.images,
            attack.broken,
        ]
    values += [v for c in found.checks for v in (c.observed, c.low, c.high, c.bound) if v is not None]
    values += [found.difference.b, found.difference.c, found.difference.mcnemar_p] if found.difference else []
    return [*values, found.dataset.n, found.seed]


def test_figures_equal_those_of_the_result_file(bundle: Path, tmp_path: Path) -> None:
    page = Page(reporting.write_report([bundle], tmp_path / "report.html").read_text())
    stored = AuditResult.model_validate_json((bundle / "result.json").read_bytes())
    assert set(_numbers(stored)) - set(page.figures) == set()
    assert set(page.figures) - {*_numbers(stored), stored.seconds} == set()  # and none that is not there
    for shown in ("73.2 %", "68.8 to 77.3 %", "84.2 %", "+0.6", "−0.1 to +1.3", "1\u00a0234", "0.146", "2\u00a0007"):
        assert shown in page.text, shown


@pytest.mark.parametrize(
    ("status", "word"), [("pass", "Pass"), ("fail", "Fail"), ("inconclusive", "Inconclusive"), ("invalid", "Invalid")]
)
def test_verdict_comes_first(status: str, word: str) -> None:
    page = Page(reporting.render([ReportInput(result(status))]))  # type: ignore[arg-type]
    text = page.text[page.text.index("robustness audit\n") :]
    order = [
        text.index(w)
        for w in (f"\n{word}\n", "the robust drop is at most 1.3 points", "Accuracies", "Attacks", "Checks", "Provenance")
    ]
    assert order == sorted(order)
    assert [t for t, a in page.tags if a.get("class") == f"verdict {status}"] == ["section"]
    assert any("doubtful" in (a.get("class") or "") for _, a in page.tags) == (status == "invalid")


def test_nothing_is_loaded_and_nothing_runs(bundle: Path, tmp_path: Path) -> None:
    text = reporting.write_report([bundle], tmp_path / "report.html").read_text()
    page = Page(text)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert {t for t, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    targets = [v for _, a in page.tags for k, v in a.items() if k in {"src", "href", "xlink:href", "srcset", "data"}]
    assert len(targets) >= 36
    assert all(v and v.startswith(("data:image/png;base64,", "#")) for v in targets)
    assert all(part.startswith("url(#") for part in re.findall(r"url\([^)]*\)", text))
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    assert any(
        a.get("http-equiv") == "Content-Security-Policy" and "default-src 'none'" in (a["content"] or "") for _, a in page.tags
    )


def test_page_is_accessible(bundle: Path, tmp_path: Path) -> None:
    text = reporting.write_report([bundle], tmp_path / "report.html").read_text()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert dict(page.tags)["html"]["lang"] == "en"
    headings = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    assert all(a.get("scope") for t, a in page.tags if t == "th")
    assert all(a.get("aria-hidden") == "true" for t, a in page.tags if t == "svg")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = {v for _, a in page.tags for k, v in a.items() if k == "aria-labelledby"}
    assert named and named <= set(ids)
    for media in ("prefers-color-scheme: dark", "@media print", "max-width"):
        assert media in text


def test_same_inputs_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    first = reporting.write_report([bundle], tmp_path / "a.html").read_bytes()
    assert reporting.write_report([bundle], tmp_path / "b.html").read_bytes() == first


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "{{ 7*7 }}", "&lt;"]
)
def test_hostile_names_are_text(tmp_path: Path, evil: str) -> None:
    hostile = result(path=f"runs/{evil}/model.onnx", policy={"name": evil, evil: evil})
    hostile = hostile.model_copy(
        update={
            "verdict": hostile.verdict.model_copy(update={"reasons": (evil,)}),
            "checks": tuple(c.model_copy(update={"name": evil, "message": evil}) for c in hostile.checks),
            "dataset": hostile.dataset.model_copy(update={"name": evil}),
            "engine": hostile.engine.model_copy(update={"attacks": {evil: next(iter(hostile.engine.attacks.values()))}}),
        }
    )
    folder = audit_bundle(tmp_path / "demo", given=hostile, classes=(evil, f"{evil}2", "bag"))
    page = Page(reporting.render([reporting.read(folder)]))
    assert {"script", "b"} & {t for t, _ in page.tags} == set()
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    assert page.text.count(evil) >= 8
    assert evil in page.text[page.text.index("Images that broke") :]


def test_hostile_loss_term_is_text() -> None:
    lines = [{**line, "<script>x</script>": 0.5, "$\\frac$": 0.1} for line in metrics()]
    drawn = curves(lines)
    assert drawn is not None and "<script" not in drawn.loss and "&lt;script&gt;" in drawn.loss


def test_pictures_show_what_broke(bundle: Path) -> None:
    given = reporting.read(bundle)
    shown = pictures.gallery(given)
    assert shown is not None and shown.broken == 14 and len(shown.triples) == 12  # image 0 was wrong from the start
    assert 100 not in {t.index for t in shown.triples}
    first = shown.triples[0]
    assert (first.label, first.clean_answer, first.adversarial_answer) == ("shirt", "shirt", "shoe")
    assert {t.label for t in shown.triples[:3]} == {"shirt", "shoe", "bag"}
    assert shown.factor == pytest.approx(255 / 16)
    position = first.index - 100
    assert np.array_equal(_pixels(first.clean), np.rint(images()["x"][position, 0] * 255))
    amplified = 0.5 + shown.factor * (images()["x_adv"] - images()["x"])[position, 0]
    assert np.array_equal(_pixels(first.difference), np.rint(np.clip(amplified.astype(np.float64), 0, 1) * 255))


def _pixels(uri: str) -> np.ndarray:
    """Decode the one kind of PNG that is written, with its checksums."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    channels = 3 if chunks[b"IHDR"][9] == 2 else 1
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, channels).squeeze(-1) if channels == 1 else rows[:, 1:].reshape(height, width, 3)


def test_colour_pictures_and_odd_values() -> None:
    x = np.random.default_rng(1).random((3, 5, 7), dtype=np.float32)
    assert np.array_equal(_pixels(pictures.picture(x)), np.rint(x.astype(np.float64) * 255).transpose(1, 2, 0))
    odd = np.array([[[np.nan, np.inf], [-np.inf, 2.0]]], np.float32)
    assert _pixels(pictures.picture(odd)).tolist() == [[0, 255], [0, 255]]
    assert _pixels(pictures.picture(np.ones((4, 2, 2), np.float32))).shape == (2, 2)


def test_large_pictures_are_fewer() -> None:
    big = images(channels=3, size=200)
    given = ReportInput(
        result(),
        adversarial=reporting.Adversarial(**big),
        predictions={100 + i: reporting.records.Answer(i % 3, (i + 1) % 3, False) for i in range(N)},
    )
    shown = pictures.gallery(given)
    assert shown is not None and len(shown.triples) == 4 and shown.triples[0].label == "class 0"


def test_curves_follow_the_metrics() -> None:
    drawn = curves(metrics())
    assert drawn is not None
    assert "kl_robust" in drawn.loss and "clean" in drawn.accuracy and "robust" in drawn.accuracy
    assert "epoch 3" in drawn.caption and "clean 80.0 % and robust 60.0 %" in drawn.caption
    assert "900 images per second" in drawn.caption and "70 %" in drawn.caption
    assert "var(--line-1)" in drawn.loss and "currentColor" in drawn.loss and "<style" not in drawn.loss


def test_what_a_method_balances_is_drawn_apart_from_its_losses() -> None:
    state = {"w_adv": 0.5, "w_nat": 0.5, "tau_adv": 1.0, "tau_nat": 3.9, "entropy_adv": 1.2, "entropy_nat": 0.1}
    drawn = curves([{**line, **state} if "loss" in line else line for line in metrics()])
    assert drawn is not None
    assert [gauge.name for gauge in drawn.gauges] == ["loss weight", "teacher temperature", "teacher entropy, nats"]
    weights, temperatures, entropies = (gauge.drawing for gauge in drawn.gauges)
    for name, drawing in zip(state, (weights, weights, temperatures, temperatures, entropies, entropies), strict=True):
        assert name in drawing and name not in drawn.loss
        assert drawing.count(">tau_adv<") == (1 if drawing is temperatures else 0)
    assert "kl_robust" in drawn.loss
    ids = [set(re.findall(r' id="([^"]*)"', drawing)) for drawing in (drawn.loss, weights, temperatures, entropies)]
    assert sum(map(len, ids)) == len(set().union(*ids)), "ids of several drawings on one page differ"


def test_the_page_shows_a_drawing_for_each_kind_of_state() -> None:
    lines = tuple({**line, "w_adv": 0.5, "tau_adv": 1.0} if "loss" in line else line for line in metrics())
    page = reporting.render([ReportInput(result(), metrics=lines)])
    for label in ("Loss weight over the steps", "Teacher temperature over the steps"):
        assert page.count(f'<figure role="img" aria-label="{label}"><svg') == 1
    assert "entropy" not in page


def test_a_method_without_state_has_no_such_drawing() -> None:
    drawn = curves(metrics())
    assert drawn is not None and drawn.gauges == ()


def test_one_epoch_is_a_whole_number_on_the_axis() -> None:
    drawn = curves([{"step": 9, "epoch": 0, "clean_accuracy": 0.7, "robust_accuracy": 0.6}])
    assert drawn is not None and drawn.loss == ""
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.accuracy)
    assert {"0", "1", "2"} <= set(ticks) and not [t for t in ticks if "." in t]


@pytest.mark.parametrize("lines", [(), ({"step": 1},), ({"step": 0, "loss": "NaN"}, {"step": 1, "loss": float("nan")})])
def test_metrics_without_figures_draw_nothing(lines: tuple[dict[str, object], ...]) -> None:
    assert curves(lines) is None


def test_result_alone_has_no_pictures_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(result(source=False).model_dump_json(by_alias=True))
    page = Page(reporting.write_report([file], tmp_path / "new" / "report.html").read_text())
    assert not [t for t, _ in page.tags if t in {"img", "figure"}]
    assert "No source was given to compare with." in page.text and "Made from result.json alone" in page.text
    assert "Source model" not in page.text


def test_provenance_names_every_digest(bundle: Path) -> None:
    given = reporting.read(bundle)
    assert [(link.kind, link.found) for link in given.chain] == [("audit", True), ("onnx", True), ("checkpoint", True)]
    page = Page(reporting.render([given]))
    found = given.result
    assert found.source is not None
    for text in (found.artifact.sha256, found.source.sha256, found.dataset.sha256, *(link.digest for link in given.chain)):
        assert text in page.text
    assert "robustkd audit runs/demo/cpu-int8/model.onnx --source runs/demo/checkpoint --dataset fashion --n 1234" in page.text
    assert "--norm linf --eps 8/255 --policy quick --tolerance 1.0 --seed 3" in page.text
    assert given.manifest is not None and given.manifest.versions["numpy"] in page.text


def test_a_foreign_checkpoint_lends_no_curves(bundle: Path) -> None:
    manifest = bundle.parent.parent / "checkpoint" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    given = reporting.read(bundle)
    assert given.metrics == () and [link.found for link in given.chain] == [True, True, False]
    assert "was not found beside this report" in Page(reporting.render([given])).text


def test_run_folder_means_every_audit_in_it(bundle: Path, tmp_path: Path) -> None:
    run = bundle.parent.parent
    audit_bundle(run, "cpu-fp32", given=result("fail", path="runs/demo/cpu-fp32/model.onnx"))
    assert reporting.find([run, bundle]) == [run / "cpu-fp32" / "audit", bundle]
    text = reporting.write_report([run], tmp_path / "report.html").read_text()
    page = Page(text)
    assert "2 audited files" in page.text and "1 pass, 1 fail" in page.text
    assert text.count("Training loss and its terms") == 1 and "The same checkpoint as above" in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["result.json", "records.parquet", "adversarial.npz", "manifest.json"])
def test_one_flipped_byte_is_exit_5(bundle: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = bundle / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert cli(["report", str(bundle), "--output", str(tmp_path / "report.html")]) == 5
    assert not (tmp_path / "report.html").exists()
    assert str(bundle) in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": "robustkd.audit/2"}', b"\xff\xfe"])
def test_no_result_is_exit_5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    assert cli(["report", str(tmp_path / "result.json"), "--output", str(tmp_path / "report.html")]) == 5
    assert cli(["compare", str(tmp_path)]) == 5


def test_nothing_to_report_is_exit_5(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli(["compare", str(tmp_path / "empty")]) == 5
    assert "there is no audit in this folder" in capsys.readouterr().err
    assert cli(["compare", str(tmp_path / "absent")]) == 5
    assert cli(["report", str(bundle), "--output", str(bundle)]) == 5  # a folder
    assert cli(["report", str(bundle)]) == 2


def test_damage_inside_sound_bundles_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "records.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ArtifactError, match=r"records\.parquet cannot be read"):
        reporting.records.read_predictions(tmp_path / "records.parquet")
    np.savez(tmp_path / "adversarial.npz", **(images() | {"y": np.arange(3)}))
    with pytest.raises(ArtifactError, match="images in pairs"):
        reporting.inputs._adversarial(tmp_path)
    (tmp_path / "adversarial.npz").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match="cannot be read"):
        reporting.inputs._adversarial(tmp_path)


def test_records_without_answers_show_no_pictures(tmp_path: Path) -> None:
    pq.write_table(records().select(["index", "label"]), tmp_path / "records.parquet")
    assert reporting.records.read_predictions(tmp_path / "records.parquet") is None
    given = ReportInput(result(), adversarial=reporting.Adversarial(**images()))
    assert pictures.gallery(given) is None


def test_commands_print_what_the_files_hold(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(result("fail", source=False, seed=4).model_dump_json(by_alias=True))
    assert cli(["report", str(bundle), str(other), "--output", str(tmp_path / "page.html")]) == 0
    streams = capsys.readouterr()
    assert streams.out == "" and "page.html" in streams.err
    assert cli(["compare", str(bundle), str(other), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in value["results"]] == ["pass", "fail"]
    assert value["results"][0]["robust_accuracy"] == result().engine.robust_accuracy.model_dump()
    assert value["results"][0]["drop"]["estimate"] == 0.0057 and value["results"][1]["drop"] is None
    assert value["mismatches"] == ["These audits used different seeds: 3, 4."]
    assert cli(["compare", str(bundle), str(other)]) == 0
    table = capsys.readouterr().out
    assert "73.2 % (68.8 to 77.3)" in table and "Inconclusive" not in table and "different seeds" in table


def test_bounds_do_not_make_audits_unlike() -> None:
    loose = result(policy={"name": "quick", "apgd_steps": 100, "bounds": {"tolerance": 5.0}})
    strict = result(policy={"name": "quick", "apgd_steps": 100, "bounds": {"tolerance": 0.5}})
    assert reporting.mismatches([loose, strict]) == []
    assert reporting.mismatches([loose, result(policy={"name": "quick", "apgd_steps": 20})])


def test_summary_is_markdown_that_starts_no_markup() -> None:
    text = reporting.summary(result("inconclusive", path="a|b/<i>.onnx"))
    assert text.startswith("**Inconclusive**") and "- the tolerance is 1.0" in text
    assert "73.2 % (68.8 to 77.3)" in text and "+0.6 (−0.1 to +1.3)" in text
    assert "a\\|b/\\<i>.onnx" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 + 6 and [line.count(" | ") + line.count("-|-") for line in rows] == [2] * 5 + [3] * 6


def test_numbers_as_people_read_them() -> None:
    assert [numbers.percent(v) for v in (0.8125, 1.0, 0.0, -0.0001, float("nan"))] == [
        "81.2 %",
        "100.0 %",
        "0.0 %",
        "0.0 %",
        "n/a",
    ]
    assert [numbers.points(v) for v in (0.011, -0.011, 0.0001)] == ["+1.1", "−1.1", "0.0"]
    assert [numbers.eps(v) for v in (8 / 255, 0.031, 0.5, 0.0, 1 / 255)] == ["8/255", "0.031", "0.5", "0.0", "1/255"]
    assert [numbers.seconds(v) for v in (0.44, 12.4, 185, 7800)] == ["0.4 s", "12 s", "3 min 5 s", "2 h 10 min"]


def test_missing_packages_answer_with_their_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequirementError, match=r"robustkd\[report\]"):
        curves(metrics())
    reporting.html._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RequirementError, match=r"robustkd\[report\]"):
        reporting.render([ReportInput(result())])


def test_reports_need_no_torch(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from robustkd.reporting import write_report; "
        f"write_report([Path({str(bundle)!r})], Path({str(tmp_path / 'r.html')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "r.html").is_file()
