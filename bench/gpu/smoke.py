"""The first minute on a GPU: the tests of tests/gpu, and a training step in both precisions against the plain one.

python -m bench.gpu.smoke --output OUT
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.gpu.common import AGAIN, ROOT, Clock, Failed, TimeUp, graceful, parser, read, save, say, told

STEPS = ("fp32", "bf16", "bf16-attack")
CASE = "dgad/rn18/resnet-18"
DRY_CASE = "dgad/resnet18-w0.125/*"


def main(argv: list[str]) -> int:
    given = parser(__doc__, data=False)
    given.add_argument("-k", dest="only", default="", help="only tests whose names hold this")
    asked = given.parse_args(argv)
    graceful()
    clock, command = Clock(asked.minutes), told("smoke", argv)
    asked.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"tests": None, "steps": {}}
    code = 0
    try:
        found["tests"] = tests(asked.output, clock, dry=asked.dry, only=asked.only)
        save(asked.output, "smoke", found, command)
        for precision in STEPS[:1] if asked.dry else STEPS:
            found["steps"][precision] = step(asked.output, clock, precision, dry=asked.dry)
            save(asked.output, "smoke", found, command)
    except TimeUp:
        code = AGAIN
    except Failed as error:
        found["failed"] = str(error)
        code = 1
    save(asked.output, "smoke", found, command)
    ran = found["tests"] or {}
    say(f"tests: {ran.get('passed', 0)} passed, {len(ran.get('failures', []))} failed; steps: {', '.join(found['steps'])}")
    return code or int(bool(ran.get("failures")) or not ran.get("passed"))


def tests(output: Path, clock: Clock, *, dry: bool, only: str) -> dict[str, Any]:
    """tests/gpu: those that need a GPU, or in a dry run the same ones on the CPU."""
    report = (output / "tests.xml").resolve()
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT, ROOT / "tests" / "gpu", f"--junitxml={report}"]
    words += ["-m", "not gpu" if dry else "gpu", *(["-k", only] if only else [])]
    clock.python(*words, ok=(0, 1, 5))
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None  # pytest writes one
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failures = {
        f"{case.get('classname')}::{case.get('name')}": (case.find(kind).get("message") or "")[:500]  # type: ignore[union-attr]
        for case in suite.iter("testcase")
        for kind in ("failure", "error")
        if case.find(kind) is not None
    }
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    return {"passed": passed, "skipped": count["skipped"], "failures": failures, "seconds": float(suite.get("time", 0))}


def step(output: Path, clock: Clock, precision: str, *, dry: bool) -> list[dict[str, Any]]:
    """`python -m bench step` in a precision; its own file lies beside."""
    device = "cpu" if dry else "cuda"
    words = [
        "-m",
        "bench",
        "step",
        "--quick",
        "--device",
        device,
        "--precision",
        precision,
        "--only",
        DRY_CASE if dry else CASE,
    ]
    clock.python(*words, env={"ROBUSTKD_BENCH_RESULTS": str(output.resolve())})
    odd = [value for value, usual in ((device, "cpu"), (precision, "fp32")) if value != usual]
    rows: list[dict[str, Any]] = read(output / ("-".join(["step", *odd]) + ".json")).get("rows", [])
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
