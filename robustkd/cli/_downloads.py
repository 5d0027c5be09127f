"""A file on its way here: a bar on a terminal, a plain line now and then where stderr is a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from robustkd.cli._print import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY_S = 10.0
"""Seconds between plain lines."""


class Downloads:
    """Listens to `download` events: the file's name, the bytes there are, and all of them where the server says."""

    def __init__(self) -> None:
        self.console = console(err=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.file, self.said = "", 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event; others are not for it, beyond their message."""
        if event["event"] != "download":
            self.close()
            self.console.print(event["message"], markup=False)
            return
        file, done, total = event["file"], event["done"], event["total"]
        if file != self.file:
            self._begin(file, total)
        over = done == total
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total)
        elif over or time.monotonic() - self.said > EVERY_S:
            self.said = time.monotonic()
            self.console.print(f"{file}: {_size(done)}" + (f" of {_size(total)}" if total else ""), markup=False)
        if over:
            self.close()

    def __enter__(self) -> Downloads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.file = None, ""

    def _begin(self, file: str, total: int | None) -> None:
        self.close()
        self.file, self.said = file, time.monotonic()
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        self.bar = Progress(text, BarColumn(bar_width=20), DownloadColumn(), TimeRemainingColumn(), console=self.console)
        self.bar.start()
        self.task = self.bar.add_task(file, total=total)


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)
