"""One file from the web: resumed where it broke off, checked, and in its place only when it is whole.

The part that is there lies beside the file as NAME.part, with the server's mark of its version in NAME.part.json: only
a part of the same version is continued.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustkd.bundle import sha256, write_json
from robustkd.errors import ArtifactError
from robustkd.models._files import is_page, start_of
from robustkd.signals import check

Told = Callable[[int, "int | None"], None]
"""Called with the bytes there are and the bytes there will be, or None where the server does not say."""

CHUNK = 1 << 18
TIMEOUT_S = 30.0
TRIES = 4
"""Attempts in a row that bring nothing before giving up."""
PAUSE_S = 1.0
AGAIN = {408, 429, 500, 502, 503, 504}


class _Broken(Exception):
    """The transfer broke off; what came is kept."""


def fetch(url: str, file: Path, *, digest: str | None = None, told: Told = lambda done, total: None) -> Path:
    """Bring a file from a http(s) address; one that is there already is left as it is.

    Args:
        url: its address.
        file: where it goes.
        digest: its SHA-256, with or without `sha256:`.
        told: how far it is.

    Raises:
        ArtifactError: the server is out of reach or has no such file, a web page came instead, or the digest differs.
        Interrupted: a signal asked for a stop; the next call goes on from there.
    """
    part = file.with_name(f"{file.name}.part")
    with _alone(file):
        if not file.is_file():
            _whole(url, file, part, told)
            _check(url, file, part, digest)
            part.replace(file)
            _mark(part).unlink(missing_ok=True)
    return file


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold the file for one process; the others wait, and find it there."""
    from filelock import FileLock

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_name(f".{file.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise ArtifactError(
            f"cannot write here: {error.strerror}", where=str(file.parent), fix="point ROBUSTKD_TEACHERS at a folder of yours"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _whole(url: str, file: Path, part: Path, told: Told) -> None:
    fruitless = 0
    while True:
        before = _size(part)
        try:
            return _transfer(url, part, told)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code not in AGAIN:
                raise _refused(url, file, f"{_host(url)} answers {reason}", "check the address") from error
        except urllib.error.URLError as error:
            said = getattr(error.reason, "strerror", None) or error.reason
            raise _refused(url, file, f"cannot reach {_host(url)}: {said}", "go online") from error
        except _Broken as error:
            reason = str(error)
        fruitless = 0 if _size(part) > before else fruitless + 1
        if fruitless >= TRIES:
            raise _refused(url, file, f"the download of {file.name} breaks off: {reason}", "try again later, it continues")
        check()
        time.sleep(PAUSE_S * fruitless)


def _refused(url: str, file: Path, what: str, mend: str) -> ArtifactError:
    return ArtifactError(what, where=url, fix=f"{mend}; or fetch it elsewhere, and put it at {file.absolute()}")


def _transfer(url: str, part: Path, told: Told) -> None:
    have, version = _size(part), _version(part)
    headers = {"User-Agent": "robustkd", "Accept-Encoding": "identity"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        part.unlink(missing_ok=True)
        raise _Broken("the part there was does not belong to it") from error
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error
    with answer:
        have = have if answer.status == http.client.PARTIAL_CONTENT and _starts_at(answer, have) else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        if not have:
            write_json(_mark(part), {"url": url, "version": _strong(answer)})
        with part.open("ab" if have else "wb") as stream:
            while chunk := _read(answer):
                stream.write(chunk)
                have += len(chunk)
                told(have, total)
                check()
    if total is not None and have < total:
        raise _Broken(f"{have} of {total} bytes came")


def _read(answer: Any) -> bytes:
    """The next bytes; what fails here is the connection, what fails elsewhere the disk."""
    try:
        chunk: bytes = answer.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error
    return chunk


def _starts_at(answer: Any, have: int) -> bool:
    """Whether a partial answer continues at that byte; one that does not would be put in the wrong place."""
    if str(answer.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
        return True
    raise _Broken("the server sent another range than asked for")


def _strong(answer: Any) -> str | None:
    """The mark of the version that a server sends; a weak one does not promise the same bytes."""
    tag = answer.headers.get("ETag")
    return str(tag) if tag and not str(tag).startswith("W/") else answer.headers.get("Last-Modified")


def _check(url: str, file: Path, part: Path, digest: str | None) -> None:
    if is_page(start_of(part)):
        _drop(part)
        raise _refused(url, file, f"a web page came in place of {file.name}", "open the address in a browser")
    if digest is not None and sha256(part).removeprefix("sha256:") != digest.removeprefix("sha256:"):
        _drop(part)
        raise _refused(url, file, f"{file.name} is not the file described: its digest differs", "check address and digest")


def _drop(part: Path) -> None:
    for file in (part, _mark(part)):
        file.unlink(missing_ok=True)


def _version(part: Path) -> str | None:
    try:
        version = json.loads(_mark(part).read_bytes())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _mark(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _host(url: str) -> str:
    return urllib.request.Request(url).host or url
