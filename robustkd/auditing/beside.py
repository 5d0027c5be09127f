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
from torch import Tensor, fx, nn

from robustkd.attacks._base import Model, isolated, prepared
from robustkd.auditing.quick import leaves
from robustkd.engines.importer.module import OnnxModule
from robustkd.engines.onnx_torch import OnnxTorchEngine
from robustkd.engines.ort import OrtEngine
from robustkd.models._fold import FROZEN
from robustkd.models._winograd import within

MOST = 4
"""Chunks at a time: what is Python in an attack runs for one of them only."""
SMALL = 2**27
"""Most bytes that a chunk holds: larger blocks of memory are kept for one thread alone (`robustkd.heap`)."""
HELD = 8
"""Images on which it is measured what one of them holds."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def room(chunks: Iterable[int], batch: int, device: torch.device) -> int:
    """How many chunks of these lengths may be attacked at once: none waits long for another if all are full."""
    if device.type != "cpu" or "OpenMP" not in torch.__config__.parallel_info():
        return 1  # elsewhere the threads inside operators cannot be divided
    return max(1, min(sum(length == batch for length in chunks), torch.get_num_threads(), MOST))


def fitting(models: Iterable[object], x: Tensor, batch: int, most: int) -> int:
    """How many chunks may be attacked at once: `most`, or one where a model is to be asked by one thread.

    Several may ask networks that we made, and ONNX files; a user's may keep a state. Chunks that hold much, and networks
    with layers for Winograd's way, have operators long enough to be shared between cores.

    Args:
        models: what attacks work on.
        x: some images.
        batch: images of a chunk.
        most: chunks at once.
    """
    asked = {id(leaf): leaf for model in models for leaf in leaves(model)}.values()
    if most < 2 or not all(map(_known, asked)):
        return 1
    return most if all(_small(leaf, x, batch) for leaf in asked if isinstance(leaf, nn.Module)) else 1


def threads(net: nn.Module, x: Tensor, batch: int, most: int) -> int:
    """The threads inside an operator of a network that up to `most` chunks ask at once."""
    return torch.get_num_threads() // (most if most > 1 and _small(net, x, batch) else 1)


def _small(net: nn.Module, x: Tensor, batch: int) -> bool:
    return batch * held(net, x) <= SMALL


def held(net: nn.Module, x: Tensor) -> int:
    """Bytes that an image holds while a network's gradient is looked for."""
    stores: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        store = tensor.untyped_storage()
        stores[store.data_ptr()] = store.nbytes()
        return tensor

    some = x[:HELD].clone().requires_grad_(True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(some)
    return sum(stores.values()) // len(some)


def _known(leaf: object) -> bool:
    if isinstance(leaf, fx.GraphModule):
        return FROZEN in leaf.meta and not within(leaf)
    return isinstance(leaf, (OnnxModule, OrtEngine, OnnxTorchEngine))


@contextmanager
def untouched(models: Iterable[Model], seed: int) -> Iterator[None]:
    """No attack inside changes flags of models that another reads; random states are as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(isolated(seed))
        for model in models:
            stack.enter_context(prepared(model))
        yield


def side_by_side(do: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """What is made of each item, in the order in which they end; with one worker in theirs. No more workers than items.

    Raises:
        Exception: what the first of them raised that failed; those at work end first, the others do not begin.
    """
    if workers < 2:
        yield from map(do, items)
        return
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),))
    try:
        for ended in as_completed([pool.submit(do, item) for item in items]):
            yield ended.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # what a worker sets holds for itself, and for threads yet to come
