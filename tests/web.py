"""A web server for the tests of downloads: one file, with the faults of real servers on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server has and how it behaves; `seen` are the ranges asked for, in order ("" for the whole).

    Attributes:
        content: of the file, whatever the path.
        version: its ETag; empty sends none.
        type: Content-Type.
        ranges: whether the server answers a request for a part with a part.
        cuts: after how many bytes each answer in turn breaks off; None or no entry: not at all.
        statuses: an error for each answer in turn; 0 or no entry: none.
        shift: by how many bytes a part begins too late.
        sized: whether it says how long the file is.
    """

    content: bytes
    version: str = '"1"'
    type: str = "application/octet-stream"
    ranges: bool = True
    cuts: list[int | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    shift: int = 0
    sized: bool = True
    seen: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def served(content: bytes) -> Iterator[Site]:
    """Serve a file on this machine while inside."""
    site = Site(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, site)

        def do_HEAD(self) -> None:
            _answer(self, site)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}/models/net.pt"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(request: BaseHTTPRequestHandler, site: Site) -> None:
    asked = request.headers.get("Range", "")
    if request.command == "GET":
        site.seen.append(asked)
    request.close_connection = True
    if status := site.statuses.pop(0) if site.statuses else 0:
        request.send_error(status)
        return
    first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    part = asked and site.ranges and request.headers.get("If-Range") == site.version
    if part and first >= len(site.content):
        request.send_error(416)
        return
    first = first + site.shift if part else 0
    body = site.content[first:]
    request.send_response(206 if part else 200)
    request.send_header("Content-Type", site.type)
    if site.sized:
        request.send_header("Content-Length", str(len(body)))
    if part:
        request.send_header("Content-Range", f"bytes {first}-{len(site.content) - 1}/{len(site.content)}")
    if site.version:
        request.send_header("ETag", site.version)
    request.send_header("X-Repo-Commit", "0" * 40)  # by which the Hub's downloader knows a file of the Hub
    request.end_headers()
    if request.command == "HEAD":
        return
    cut = site.cuts.pop(0) if site.cuts else None
    request.wfile.write(body[:cut])
