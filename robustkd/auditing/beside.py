"""Chunks of an audit side by side, each on a part of the cores, in one process.

The operators of a network of edge size are too short to be shared between cores; whole chunks are not. A chunk's batch and
randomness are its own, so what it yields does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import fx, nn

from robustkd.attacks._base import Model, isolated, prepared
from robustkd.auditing.answers import Answers
from robustkd.auditing.quick import Own
from robustkd.auditing.twin import Surrogate, Tamed, Values
from robustkd.engines.importer.module import OnnxModule
from robustkd.engines.onnx_torch import OnnxTorchEngine
from robustkd.engines.ort import OrtEngine
from robustkd.models._fold import FROZEN

MOST = 4
"""Chunks at a time: what is Python in an attack runs for one of them only."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def room(chunks: Iterable[int], batch: int, device: torch.device) -> int:
    """How many chunks of these lengths may be attacked at once: none waits long for another if all are full."""
    if device.type != "cpu" or "OpenMP" not in torch.__config__.parallel_info():
        return 1  # elsewhere the threads inside operators cannot be divided
    return max(1, min(sum(length == batch for length in chunks), torch.get_num_threads(), MOST))


def steady(model: object) -> bool:
    """Whether several threads may ask this model at once: networks that we made, and ONNX files; a user's may keep a state."""
    if isinstance(model, Surrogate):
        return steady(model.values) and steady(model.twin)
    if isinstance(model, (Own, Tamed, Answers)):
        return steady(model.net)
    if isinstance(model, Values):
        return isinstance(model.engine, (OrtEngine, OnnxTorchEngine))
    return isinstance(model, OnnxModule) or (isinstance(model, fx.GraphModule) and FROZEN in model.meta)


@contextmanager
def untouched(models: Iterable[Model], seed: int) -> Iterator[None]:
    """No attack inside changes flags of models that another reads; random states are as before afterwards."""
    with ExitStack() as held:
        held.enter_context(isolated(seed))
        for model in models:
            if isinstance(model, nn.Module):
                held.enter_context(prepared(model))
        yield


def side_by_side(do: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """What is made of each item, in the order in which they end; with one worker in theirs.

    Raises:
        Exception: what the first of them raised that failed; those at work end first, the others do not begin.
    """
    workers = min(workers, len(items))
    if workers < 2:
        yield from map(do, items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    try:
        for ended in as_completed([pool.submit(do, item) for item in items]):
            yield ended.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a worker sets holds for itself, and for threads yet to come
