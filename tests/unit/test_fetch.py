"""Downloads from a server with faults: resumed, checked, whole or not there, and a message that says what to do."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustkd.errors import ArtifactError, Interrupted
from robustkd.training import fetch as fetching
from robustkd.training.fetch import TRIES, fetch
from tests.web import Site, served

CONTENT = bytes(range(256)) * 4096  # one MiB: several chunks


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    with served(CONTENT) as found:
        yield found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "net.pt"


def left(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir() if not path.name.startswith("."))


def refused(site: Site, file: Path, digest: str | None = None) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        fetch(site.url, file, digest=digest)
    assert caught.value.exit_code == 5 and caught.value.where == site.url
    assert caught.value.fix.endswith(f"or fetch it elsewhere, and put it at {file}")
    return caught.value


def test_a_file_comes_whole_and_says_how_far_it_is(site: Site, file: Path) -> None:
    told: list[tuple[int, int | None]] = []
    assert fetch(site.url, file, told=lambda *now: told.append(now)) == file
    assert file.read_bytes() == CONTENT and left(file) == ["net.pt"]
    assert [done for done, _ in told] == sorted({done for done, _ in told}) and len(told) > 1
    assert told[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("form", ["sha256:{}", "{}"])
def test_the_right_digest_is_taken_with_or_without_its_name(site: Site, file: Path, form: str) -> None:
    digest = form.format(hashlib.sha256(CONTENT).hexdigest())
    assert fetch(site.url, file, digest=digest).read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_asked_for(site: Site, file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"mine")
    assert fetch(site.url, file).read_bytes() == b"mine" and not site.seen


def test_a_cut_connection_is_taken_up_where_it_broke(site: Site, file: Path) -> None:
    site.cuts = [300_000, 300_000]
    assert fetch(site.url, file).read_bytes() == CONTENT and left(file) == ["net.pt"]
    assert site.seen == ["", "bytes=300000-", "bytes=600000-"]


def test_a_server_that_does_not_say_how_long_the_file_is(site: Site, file: Path) -> None:
    site.sized = False
    told: list[int | None] = []
    assert fetch(site.url, file, told=lambda done, total: told.append(total)).read_bytes() == CONTENT
    assert set(told) == {None}


def test_a_server_without_ranges_begins_again(site: Site, file: Path) -> None:
    site.ranges, site.cuts = False, [300_000]
    assert fetch(site.url, file).read_bytes() == CONTENT and len(site.seen) == 2


@pytest.mark.parametrize("version", ["", 'W/"1"'], ids=["none", "weak"])
def test_without_a_firm_mark_of_its_version_a_part_is_not_continued(site: Site, file: Path, version: str) -> None:
    site.version, site.cuts = version, [300_000]
    assert fetch(site.url, file).read_bytes() == CONTENT and site.seen == ["", ""]


def test_a_part_of_another_version_is_thrown_away(site: Site, file: Path) -> None:
    site.cuts = [300_000, 0, 0, 0, 0, 0]
    error = refused(site, file)
    assert error.what.startswith("the download of net.pt breaks off: ") and error.fix.startswith(
        "try again later, it continues"
    )
    assert left(file) == ["net.pt.part", "net.pt.part.json"] and len(site.seen) == 1 + TRIES
    site.content, site.version, site.cuts = CONTENT[::-1], '"2"', []
    assert fetch(site.url, file).read_bytes() == CONTENT[::-1]


def test_a_later_call_goes_on_with_the_part(site: Site, file: Path) -> None:
    site.cuts = [300_000, 0, 0, 0, 0]
    refused(site, file)
    site.seen.clear()
    assert fetch(site.url, file).read_bytes() == CONTENT and site.seen == ["bytes=300000-"]


def test_a_signal_stops_it_and_the_next_call_goes_on(site: Site, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "check", stop)
        with pytest.raises(Interrupted):
            fetch(site.url, file)
    assert not file.exists() and 0 < (file.parent / "net.pt.part").stat().st_size < len(CONTENT)
    assert fetch(site.url, file).read_bytes() == CONTENT and site.seen[1].startswith("bytes=")


def test_a_part_longer_than_the_file_begins_again(site: Site, file: Path) -> None:
    site.cuts = [300_000, 0, 0, 0, 0]
    refused(site, file)
    site.content = CONTENT[:1000]
    assert fetch(site.url, file).read_bytes() == CONTENT[:1000]


def test_another_range_than_asked_for_is_never_put_in(site: Site, file: Path) -> None:
    site.cuts, site.shift = [300_000], 7
    assert "another range" in refused(site, file).what and not file.exists()


def test_a_web_page_in_place_of_the_file_is_not_kept(site: Site, file: Path) -> None:
    site.content, site.type = b"<!DOCTYPE html><html><title>Sign in</title>", "text/html"
    error = refused(site, file)
    assert error.what == "a web page came in place of net.pt" and error.fix.startswith("open the address in a browser; or ")
    assert not left(file)


def test_another_file_than_described_is_not_kept(site: Site, file: Path) -> None:
    error = refused(site, file, digest="0" * 64)
    assert error.what == "net.pt is not the file described: its digest differs"
    assert not left(file)


def test_a_file_that_the_server_does_not_have(site: Site, file: Path) -> None:
    site.statuses = [404]
    error = refused(site, file)
    assert error.what.startswith("127.0.0.1:") and error.what.endswith(" answers 404 Not Found")
    assert error.fix.startswith("check the address; or ") and len(site.seen) == 1


def test_a_busy_server_is_asked_again(site: Site, file: Path) -> None:
    site.statuses = [503, 429, 502]
    assert fetch(site.url, file).read_bytes() == CONTENT and len(site.seen) == 4


def test_a_server_that_stays_busy_is_given_up(site: Site, file: Path) -> None:
    site.statuses = [503] * 10
    assert "503 Service Unavailable" in refused(site, file).what and len(site.seen) == TRIES


def test_a_server_out_of_reach(file: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = refused(Site(b"", url=f"http://127.0.0.1:{port}/net.pt"), file)
    assert error.what == f"cannot reach 127.0.0.1:{port}: Connection refused" and error.fix.startswith("go online; or ")


def test_two_at_once_fetch_once(site: Site, file: Path) -> None:
    threads = [threading.Thread(target=fetch, args=(site.url, file)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_bytes() == CONTENT and len(site.seen) == 1


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot write here") as caught:
        fetch(site.url, tmp_path / "file" / "net.pt")
    assert "ROBUSTKD_TEACHERS" in caught.value.fix and not site.seen
