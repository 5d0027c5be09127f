"""metrics.jsonl and TensorBoard: one JSON object a line, cut back to the saved state when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class Log:
    """Append-only metrics of a run; without a file (in a process beside the main one) they go nowhere."""

    def __init__(self, file: Path | None, *, tensorboard: Path | None = None, keep: int = 0) -> None:
        self._file = None if file is None else file.open("ab")
        if self._file is not None:
            self._file.truncate(keep)
            self._file.seek(0, os.SEEK_END)
        self._writer = _writer(tensorboard) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, and one TensorBoard scalar for each number."""
        if self._file is not None:
            self._file.write((json.dumps({"step": step, **values}) + "\n").encode())
        for name, value in values.items():
            if self._writer is not None and isinstance(value, float):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> int:
        """Put everything on disk; returns the length of the file in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed: the metrics file has it all."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
