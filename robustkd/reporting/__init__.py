"""Reports: what an audit found, as a page, a table or rows side by side. Needs no torch."""

from __future__ import annotations

from robustkd.reporting.compare import compare, mismatches
from robustkd.reporting.html import render, write_report
from robustkd.reporting.inputs import Adversarial, Link, ReportInput, find, read
from robustkd.reporting.markdown import command, summary, table

__all__ = [
    "Adversarial",
    "Link",
    "ReportInput",
    "command",
    "compare",
    "find",
    "mismatches",
    "read",
    "render",
    "summary",
    "table",
    "write_report",
]
