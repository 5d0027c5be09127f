"""Audits as JUnit XML, which CI systems show beside unit tests: a suite per audit, a case per check and the verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from robustkd.reporting import numbers
from robustkd.result import AuditResult, Check


def junit(results: Sequence[AuditResult]) -> str:
    """The XML text. A case fails where a check blocks; the case `verdict` fails for everything but a pass."""
    root = xml.Element("testsuites", name="robustkd audit")
    for result in results:
        _suite(root, result)
    xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n"


def _suite(root: xml.Element, result: AuditResult) -> None:
    name = _legal(f"{numbers.short(result.artifact.path)} {numbers.threat(result.threat)}")
    cases = [*(_check(check) for check in result.checks), _verdict(result)]
    suite = xml.SubElement(
        root,
        "testsuite",
        name=name,
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        skipped=str(sum(case.find("skipped") is not None for case in cases)),
        errors="0",
        time=f"{result.seconds:.3f}",
    )
    told = xml.SubElement(suite, "properties")
    for key, value in _facts(result).items():
        xml.SubElement(told, "property", name=key, value=_legal(value))
    for case in cases:
        case.set("classname", name)
        suite.append(case)


def _facts(result: AuditResult) -> dict[str, str]:
    return {
        "artifact": result.artifact.sha256,
        "source": result.source.sha256 if result.source else "none",
        "dataset": f"{result.dataset.name} {result.dataset.sha256}",
        "policy": str(result.policy.get("name")),
        "clean_accuracy": f"{result.engine.clean_accuracy.estimate:.6f}",
        "robust_accuracy": f"{result.engine.robust_accuracy.estimate:.6f}",
        "verdict": result.verdict.status,
    }


def _check(check: Check) -> xml.Element:
    case = xml.Element("testcase", name=_legal(check.name))
    text = _legal(check.message)
    if check.status == "block":
        xml.SubElement(case, "failure", type="block", message=text)
    elif check.status == "skipped":
        xml.SubElement(case, "skipped", message=text)
    else:
        xml.SubElement(case, "system-out").text = f"{check.status}: {text}"
    return case


def _verdict(result: AuditResult) -> xml.Element:
    case, status = xml.Element("testcase", name="verdict"), result.verdict.status
    text = _legal("\n".join(result.verdict.reasons))
    if status == "pass":
        xml.SubElement(case, "system-out").text = f"pass: {text}"
    else:
        xml.SubElement(case, "failure", type=status, message=status).text = text
    return case


def _legal(text: str) -> str:
    """The text without the characters that XML 1.0 does not allow."""
    return re.sub(r"[^\t\n\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "?", text)
