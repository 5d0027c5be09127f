"""Whatever a name says, the page and the tables show it as text; figures are rounded, never changed."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from hypothesis import example, given
from hypothesis import strategies as st

from robustkd import reporting
from robustkd.reporting import numbers
from robustkd.result import Interval, Side
from robustkd.threat import parse_pixels
from tests.unit.audit_samples import result

#: pieces that open something in HTML, SVG, CSS, templates or Markdown, glued together at will
PIECES = ["<script>", "</", "<!--", "]]>", '"', "'", "&", "{{", "{%", "`", "|", "\n", "[a](b)", "</style>", "onload=", "é", "a"]
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join) | st.text(min_size=1, max_size=20)
FRACTIONS = st.floats(0, 1, allow_nan=False)


class Words(HTMLParser):
    """The words of the verdict, and the set of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.reasons: list[str] = []
        self.figures: list[tuple[float, str]] = []
        self._inside: str = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        if tag == "li":
            self.reasons.append("")
        if tag == "data":
            self.figures.append((float(dict(attrs)["value"] or "nan"), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "li":
            self.reasons[-1] += data
        if self._inside == "data":
            self.figures[-1] = (self.figures[-1][0], self.figures[-1][1] + data)


PLAIN = Words(reporting.render([reporting.ReportInput(result())])).tags


@given(WORDS)
@example("</li></ul><script src=//evil></script>")
def test_words_never_become_tags(words: str) -> None:
    base = result(path=words)
    hostile = base.model_copy(
        update={
            "verdict": base.verdict.model_copy(update={"reasons": (words, words)}),
            "checks": tuple(c.model_copy(update={"message": words}) for c in base.checks),
        }
    )
    page = Words(reporting.render([reporting.ReportInput(hostile)]))
    assert page.tags == PLAIN
    # the parser reads line ends and NUL as browsers do
    assert page.reasons[0].split() == words.split()


@given(WORDS)
def test_words_never_break_a_table(words: str) -> None:
    text = reporting.table([result(path=words), result()])
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert len(rows) == 4 and text.splitlines() == text.split("\n")[:-1]
    assert len({len(row.replace("\\|", "").split("|")) for row in rows}) == 1


@given(FRACTIONS, FRACTIONS, FRACTIONS)
def test_shown_figures_are_the_stored_ones_rounded(a: float, b: float, c: float) -> None:
    low, estimate, high = sorted((a, b, c))
    span = Interval(estimate=estimate, low=low, high=high)
    stored = result(source=False, checks=(), engine=Side(clean_accuracy=span, robust_accuracy=span))
    page = Words(reporting.render([reporting.ReportInput(stored)]))
    shown = {value: text for value, text in page.figures if value in (low, estimate, high)}
    again = json.loads(stored.model_dump_json())["engine"]["robust_accuracy"]
    assert {again["low"], again["estimate"], again["high"]} <= set(shown)
    for value, text in page.figures[:3]:
        assert abs(float(text.rstrip(" %")) - 100 * value) <= 0.05 + 1e-9


@given(st.floats(0, 4, allow_nan=False))
def test_eps_is_written_so_that_it_reads_back(eps: float) -> None:
    assert parse_pixels(numbers.eps(eps)) == eps
