"""Live progress on stderr: a moving line on a terminal, a plain line now and then where stderr is a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from robustkd.cli._downloads import Downloads
from robustkd.cli._print import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY_S = 20.0
"""Seconds between plain lines."""

_NOT_TERMS = {"event", "epoch", "lr", "images_per_s", "inner_share", "clock", "steps"}


class Training:
    """Listens to a training run: images/s, loss terms, accuracies on held-out images, time left."""

    def __init__(self, title: str) -> None:
        self.title, self.console = title, console(err=True)
        self._download = Downloads()
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.done = self.total = 0
        self.said = self.began = time.monotonic()
        self.first = 0
        self.accuracy = ""

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of `robustkd.training`."""
        if event["event"] != "download":
            self._download.close()
        getattr(self, f"_{event['event']}")(event)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._download.close()
        if self.bar is not None:
            self.bar.stop()

    def _note(self, event: dict[str, Any]) -> None:
        self.console.print(f"note: {event['message']}", style="yellow", markup=False)

    def _teacher(self, event: dict[str, Any]) -> None:
        self.console.print(event["message"], markup=False)

    def _start(self, event: dict[str, Any]) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        progress = event["progress"]
        self.total = event["epochs"] * event["steps"]
        self.done = self.first = progress.epoch * event["steps"] + progress.step
        self.said = self.began = time.monotonic()
        if self.console.is_terminal:
            text, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn()
            self.bar = Progress(text, BarColumn(bar_width=20), TaskProgressColumn(), left, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done)

    def _step(self, event: dict[str, Any]) -> None:
        self.done = event["clock"].step + 1
        if "loss" not in event:
            if self.bar is not None and self.task is not None:
                self.bar.update(self.task, completed=self.done)
            return
        terms = "  ".join(f"{k} {v:.3f}" for k, v in event.items() if k not in _NOT_TERMS)
        text = f"{self.title}  epoch {event['epoch'] + 1}  {event['images_per_s']:,.0f} images/s  {terms}{self.accuracy}"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, description=text)
        elif time.monotonic() - self.said > EVERY_S:
            self.said = time.monotonic()
            self.console.print(f"{text}  {self._left()} left", markup=False)

    def _evaluation(self, event: dict[str, Any]) -> None:
        clean, robust = event["clean_accuracy"], event["robust_accuracy"]
        self.accuracy = f"  clean {clean:.1%}  PGD-10 {robust:.1%}"
        epoch, seconds = event["epoch"] + 1, event["seconds"]
        self.console.print(
            f"epoch {epoch}: held-out clean {clean:.1%}, PGD-10 {robust:.1%}  ({seconds:.0f} s, {self._left()} left)",
            markup=False,
        )

    def _stage(self, event: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.console.print(event["message"], markup=False)

    def _audit(self, event: dict[str, Any]) -> None:
        self.console.print(f"  {event['message']}", markup=False)

    def _left(self) -> str:
        done = self.done - self.first
        seconds = (time.monotonic() - self.began) / done * (self.total - self.done) if done else 0.0
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
