"""The processes of one run: which of them leads, and what all of them agree on. Accelerate launches and reduces.

One process is a team as well: nothing is sent, and each function here does what a single-process loop would do.
Whatever is raised in one process ends all of them at the same place, so none waits for one that has left.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robustkd.errors import Interrupted, RequirementError, RobustKDError
from robustkd.signals import received
from robustkd.training.batches import Place

T = TypeVar("T")


class Team:
    """The processes of a run, seen from one of them."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.main: bool = accelerator.is_main_process
        self.place = Place(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.place.world == 1

    @property
    def here(self) -> int:
        """How many of the processes share this machine."""
        return 1 if self.alone else int(os.environ.get("LOCAL_WORLD_SIZE", self.place.world))

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over all processes."""
        if self.alone:
            return net
        with warnings.catch_warnings():
            # the newest torch calls it forward_sync_buffers, which older ones do not know
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            wrapped: nn.Module = self._accelerator.prepare(net)
        return wrapped

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        self._accelerator.backward(loss)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means of small tensors over all processes; not finite if one of them is not."""
        if self.alone:
            return dict(values)
        flat = torch.cat([value.float().flatten() for value in values.values()])
        parts = self._accelerator.reduce(flat, reduction="mean").split([value.numel() for value in values.values()])
        return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}

    def smallest(self, value: Tensor) -> Tensor:
        """The smallest of a number over all processes."""
        if self.alone:
            return value
        found: Tensor = self._accelerator.gather(value.detach().reshape(1))
        return found.min()

    @torch.no_grad()
    def average_statistics(self, *nets: nn.Module) -> None:
        """Give every process the mean of the running statistics, which each gathers from its own images."""
        if self.alone:
            return
        for buffer in (buffer for net in nets for buffer in net.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(self._accelerator.reduce(buffer, reduction="mean"))

    def same(self, value: T) -> T:
        """The main process's value."""
        if self.alone:
            return value
        from accelerate.utils import broadcast_object_list

        shared: T = broadcast_object_list([value])[0]
        return shared

    def asked_to_stop(self) -> int:
        """The signal that any of the processes received, or 0."""
        signum = received() or 0
        if self.alone:
            return signum
        return int(self._accelerator.gather(torch.tensor([signum], device=self.place.device)).max())

    def everywhere(self, error: RobustKDError) -> RobustKDError:
        """An error that every process raises at this place; the main one says it."""
        error.quiet = not self.main
        return error

    def check(self) -> None:
        """Stop all processes here if a signal asked one of them to.

        Raises:
            Interrupted: it did.
        """
        if signum := self.asked_to_stop():
            raise self.everywhere(Interrupted(signum))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What fails inside in one process fails in all; the first of those that met it says it.

        Nothing inside may wait for another process.
        """
        if self.alone:
            yield
            return
        from accelerate.utils import gather_object

        met: Exception | None = None
        try:
            yield
        except (RobustKDError, OSError) as error:
            met = error
        found: list[Exception | None] = gather_object([met])
        first = next((rank for rank, one in enumerate(found) if one is not None), None)
        if first is not None:
            raise _shared(met or found[first], quiet=self.place.rank != first)


def _shared(error: Exception | None, *, quiet: bool) -> Exception:
    """An error all processes raise, as one of them met it."""
    told = error or RuntimeError("an error without content came from another process")
    told.quiet = quiet  # type: ignore[attr-defined]  # an OSError takes the mark too
    return told


def join(device: str) -> Team:
    """The team this process was launched into, by torchrun, `accelerate launch` or nobody.

    It lasts as long as the process: a group that was left cannot be joined a second time.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        RequirementError: Accelerate or the device is missing.
    """
    team = Team(_accelerator(device))
    if not team.alone:
        atexit.unregister(_leave)
        atexit.register(_leave)
    return team


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _accelerator(device: str) -> Any:
    """Accelerate without its mixed precision, which would reach into the attack."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise RequirementError("training needs Accelerate", where=str(error), fix="pip install 'robustkd[train]'") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise RequirementError("no CUDA device is available", where="train.device", fix="--set train.device=auto")
    # several torch releases refuse two batch-norm forwards before one backward when buffers are broadcast
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # without a GPU Accelerate joins processes only when told that it is on a CPU; else each would train alone
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = device == "cpu" or (launched and not torch.cuda.is_available())
    if not launched:  # Accelerate keeps to the first device a process had: a second run may be on another one
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[ddp])
