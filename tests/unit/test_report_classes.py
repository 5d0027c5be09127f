"""Class by class, and the images that only the exported file lost."""

import json
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest

from robustkd import bundle as bundles
from robustkd import reporting
from robustkd.bundle import Bundle
from robustkd.reporting.per_class import LIMIT, per_class
from robustkd.reporting.pictures import gallery
from tests.unit.audit_samples import CLASSES, N, audit_bundle, images, records, result


@pytest.fixture
def given(tmp_path):
    """An audit with a source: it holds images 0 to 11 and 18, the file holds 15 to 19."""
    audit_bundle(tmp_path / "run")
    held = (np.arange(N) < 12) | (np.arange(N) == 18)
    home = tmp_path / "run" / "cpu-int8" / "second"
    with bundles.create(home, "audit", parent=Bundle.open(tmp_path / "run" / "cpu-int8")) as (work, _):
        (work / "result.json").write_text(result().model_dump_json(by_alias=True))
        pq.write_table(records().append_column("source:robust", [held.tolist()]), work / "records.parquet")
        np.savez(work / "adversarial.npz", **images())
    return reporting.read(home)


def test_the_rows_add_up_to_the_whole(given):
    rows = per_class(given)
    assert [row.name for row in rows] == list(CLASSES)
    table = records().to_pydict()
    assert sum(row.n for row in rows) == N
    assert sum(row.n * row.robust for row in rows) == pytest.approx(sum(table["robust"]))
    assert sum(row.n * row.source for row in rows) == pytest.approx(13)
    assert sum(row.lost for row in rows) == 12
    clean = sum(a == b for a, b in zip(table["clean_prediction"], table["label"], strict=True))
    assert sum(row.n * row.clean for row in rows) == pytest.approx(clean)


def test_only_what_the_source_holds_is_lost(given):
    lost, all_of_them = gallery(given, lost=True), gallery(given)
    assert lost.broken == 11 and all_of_them.broken == 14  # image 0 was wrong when clean
    assert {t.index for t in lost.triples} <= {100 + i for i in range(1, 12)}


def test_the_page_shows_both(given):
    page = reporting.render([given])
    assert "Class by class" in page and "Broken in the file, not in the source" in page and "11 of 11" in page
    assert all(name in page for name in CLASSES)
    ids: list[str] = []

    class Ids(HTMLParser):
        def handle_starttag(self, tag, attrs):
            ids.extend(value for key, value in attrs if key == "id")

    Ids().feed(page)
    assert len(ids) == len(set(ids))


def test_without_a_source_there_is_nothing_lost(tmp_path):
    audit = audit_bundle(tmp_path / "run", given=result("inconclusive", source=False, difference=None, source_model=None))
    found = reporting.read(audit)
    assert gallery(found, lost=True) is None and per_class(found)[0].source is None
    page = reporting.render([found])
    assert "Class by class" in page and "not in the source" not in page and "Source robust" not in page


def test_many_classes_show_those_that_lost_most(given):
    from dataclasses import replace

    from robustkd.reporting.records import Answer

    answers = {i: Answer(i, i, i % 7 > 0, label=i, source_robust=True) for i in range(120)}
    rows = per_class(replace(given, predictions=answers))
    assert len(rows) == LIMIT and all(row.lost for row in rows[:17]) and json.dumps(rows[0].name)
