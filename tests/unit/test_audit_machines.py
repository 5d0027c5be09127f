"""What CI systems get: JUnit XML, a Markdown summary, and the chain of custody that `verify` proves."""

import json
from xml.etree import ElementTree as xml

import pytest

from robustkd import bundle as bundles
from robustkd.bundle import Bundle
from robustkd.cli.app import run as command
from robustkd.errors import ArtifactError, ConfigError
from robustkd.reporting.junit import junit
from robustkd.reporting.machines import place, tell
from robustkd.result import Artifact, Check, Source, Verdict
from tests.unit.audit_samples import audit_bundle, result


@pytest.mark.parametrize(("status", "failures"), [("pass", 0), ("fail", 1), ("inconclusive", 1), ("invalid", 1)])
def test_the_verdict_is_a_case_that_only_a_pass_passes(status, failures):
    given = result(status, checks=(Check(name="S1", status="ok"), Check(name="S2", status="skipped", message="no source")))
    suite = xml.fromstring(junit([given])).find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", str(failures), "1")
    verdict = suite.find("testcase[@name='verdict']")
    assert (verdict.find("failure") is None) == (status == "pass")
    if status != "pass":
        assert verdict.find("failure").get("type") == status
        assert "the tolerance is 1.0" in verdict.find("failure").text


def test_a_blocking_check_fails_and_a_warning_does_not():
    cases = {case.get("name"): case for case in xml.fromstring(junit([result()])).iter("testcase")}
    assert cases["half radius"].find("failure").get("message") == "accuracy survives at 0.5"
    assert cases["agreement"].find("failure") is None and "warn" in cases["agreement"].find("system-out").text


def test_any_text_makes_legal_xml():
    odd = 'a\x00\x1b[31m <b> & "\ud800\uffff é 漢 \U0001f600'
    given = result("fail", path=f"runs/{odd}/x.onnx", verdict=Verdict(status="fail", reasons=(odd,)))
    text = junit([given, given])
    suites = xml.fromstring(text.encode("utf-8")).findall("testsuite")
    assert len(suites) == 2 and "é 漢 \U0001f600" in suites[0].find("testcase[@name='verdict']/failure").text


def test_a_summary_is_appended(tmp_path):
    file = tmp_path / "s.md"
    file.write_text("before\n")
    tell([result("fail"), result("pass")], junit_to=tmp_path / "j.xml", summary_to=file)
    text = file.read_text()
    assert text.startswith("before\n") and "**Fail**" in text and "**Pass**" in text
    assert (tmp_path / "j.xml").read_text().startswith("<?xml")


def test_where_a_summary_goes(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    with pytest.raises(ConfigError, match="GITHUB_STEP_SUMMARY"):
        place(Path("github"), None)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page"))
    assert place(Path("github"), None) == tmp_path / "page"
    assert place(tmp_path / "x", None) == tmp_path / "x" and place(None, None) is None
    with pytest.raises(ArtifactError, match="folder does not exist"):
        place(None, tmp_path / "no" / "j.xml")


def linked(run, **changes):
    """A run whose audit is about the files of its bundles."""
    audit_bundle(run)
    file, weights = run / "cpu-int8" / "model.onnx", run / "checkpoint" / "model.safetensors"
    artifact = Artifact(
        path=str(file), sha256=bundles.sha256(file), runtime="onnxruntime", runtime_version="1", precision="int8", device="cpu"
    )
    given = result(artifact=artifact).model_copy(update={"source": Source(path="s", sha256=bundles.sha256(weights))})
    stated = {**given.digests(), **changes}
    with bundles.create(run / "cpu-int8" / "second", "audit", parent=Bundle.open(run / "cpu-int8"), audited=stated) as (
        work,
        _,
    ):
        (work / "result.json").write_text(given.model_dump_json(by_alias=True))
    return run / "cpu-int8" / "second", given


def test_verify_proves_what_was_audited(tmp_path, capsys):
    audit, given = linked(tmp_path / "run")
    assert command(["verify", str(audit), "--json"]) == 0
    chain = json.loads(capsys.readouterr().out)["bundles"][0]
    assert [link["kind"] for link in chain] == ["audit", "onnx", "checkpoint"]
    assert chain[0]["audited"] == given.digests()
    assert set(given.digests()) == {"artifact", "dataset", "policy", "source"}
    assert command(["verify", str(audit)]) == 0
    assert given.artifact.sha256 in capsys.readouterr().out


@pytest.mark.parametrize("what", ["artifact", "dataset", "policy", "source"])
def test_verify_refuses_a_result_about_something_else(tmp_path, capsys, what):
    audit, _ = linked(tmp_path / "run", **{what: "sha256:" + "0" * 64})
    assert command(["verify", str(audit)]) == 5
    assert f"another {what}" in capsys.readouterr().err


def test_verify_refuses_an_audit_of_a_file_its_parent_does_not_hold(tmp_path, capsys):
    audit = audit_bundle(tmp_path / "run")
    assert command(["verify", str(audit)]) == 5
    assert "not in the bundle it names as its parent" in capsys.readouterr().err


def test_the_digest_of_the_policy_covers_the_bounds():
    policy = {"name": "quick", "bounds": {"tolerance": 1.0}}
    other = {"name": "quick", "bounds": {"tolerance": 2.0}}
    assert result(policy=policy).digests()["policy"] != result(policy=other).digests()["policy"]
