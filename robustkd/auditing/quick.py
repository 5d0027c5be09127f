"""What makes an audit's attacks quicker without touching its verdict: the judge stays as it is.

Networks give gradients and candidates with batch norms folded into convolutions, where that answers alike. One network
that is both engine and twin is asked once for value and gradient. An image leaves an attack as soon as no side needs it
any more. Should the judge not follow a folded network, the attack is run anew with the network as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from robustkd.attacks._base import Attack, Found
from robustkd.attacks._grid import on_grid
from robustkd.auditing.answers import Answers, answers
from robustkd.auditing.twin import Surrogate, Tamed, Values
from robustkd.engines._base import Engine
from robustkd.losses import margin
from robustkd.models._fold import frozen

if TYPE_CHECKING:
    from robustkd.auditing.steps import Job

#: largest difference of a logit, in standard deviations of the logits, at which a folded network answers alike
ALIKE = 1e-4


def quick(net: nn.Module, x: Tensor, *, asked: Callable[[nn.Module], int] | None = None) -> nn.Module:
    """The network with batch norms folded, or itself: where it cannot be traced, is random, or would answer otherwise.

    Args:
        net: (N, C, H, W) in [0, 1] -> logits (N, K), in eval mode.
        x: images to compare the answers on: these, and the same under noise.
        asked: where it is asked often for its answers alone: by how many threads each time.
    """
    found = frozen(net)
    if found is net:
        return net
    rng = torch.Generator().manual_seed(0)
    noisy = (x + 0.05 * torch.randn(x.shape, generator=rng).to(x)).clamp(0, 1)
    if not all(_alike(net, found, images) for images in (x, noisy)):
        return net
    sooner = answers(found, x, asked) if asked else found
    return sooner if sooner is found or all(_alike(found, sooner, images) for images in (x, noisy)) else found


@torch.no_grad()
def _alike(net: nn.Module, other: nn.Module, x: Tensor) -> bool:
    first, again, theirs = net(x), net(x), other(x)
    if not (torch.equal(first, again) and bool(first.isfinite().all()) and first.shape == theirs.shape):
        return False
    return bool((first - theirs).abs().max() <= ALIKE * first.std().clamp_min(1e-12))


class Own(Values):
    """An engine that is a network: asked as one, with gradients, and without a detour over arrays."""

    def __init__(self, engine: Engine, net: nn.Module) -> None:
        super().__init__(engine)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        self.images += len(x)
        logits: Tensor = self.net(x).float()
        return logits


class White(Surrogate):
    """The surrogate where engine and twin are one network: a single pass gives the values and the gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to the network's logits (N, K), scaled."""
        logits: Tensor = self.values(x)
        return logits if self.value_scale == 1.0 else logits * self.value_scale


class Enough:
    """Of which images of a chunk nothing more can be learned: broken on every side still standing, 8-bit image included.

    Args:
        job: the audit.
        index: positions of the chunk's images.
        x: these images, where the networks are.
    """

    def __init__(self, job: Job, index: NDArray[np.int64], x: Tensor) -> None:
        self._job, self._index, self._x = job, index, x
        self._sides = [("engine", job.engine, job.ledger.engine)]
        if job.source is not None and job.ledger.source is not None:
            self._sides.append(("source", job.source, job.ledger.source))
        self.calls = {"engine": 0, "source": 0}
        # an engine whose answers change by chance is never done with
        self._never = any(side.draws > 1 for _, side, _ in self._sides)

    def __call__(self, z: Tensor, rows: Tensor) -> Tensor:
        """Flags (M,) of images z (M, C, H, W) of the chunk's rows (M,)."""
        done = np.full(len(z), not self._never)
        where = self._index[rows.cpu().numpy()]
        tried = [images.cpu().numpy() for images in (z, on_grid(z, self._x[rows], self._job.threat))]
        for name, side, track in self._sides:
            standing = track.robust()[where]
            for images in tried:
                ask = np.flatnonzero(done & standing)
                if len(ask):
                    done[ask] = ~side.judge(images[ask], self._job.y[where[ask]]).robust
                    self.calls[name] += len(ask)
        return torch.from_numpy(done).to(z.device)


def attacked(job: Job, against: str, attack: Attack, index: NDArray[np.int64], seed: int) -> tuple[Found, dict[str, int]]:
    """Attack a chunk; what was found, and the images that the judges were asked on the way."""
    x, y = job.tensors(index)
    enough = Enough(job, index, x)
    model = job.models[against]
    found = attack.perturb(model, x, y, job.threat, seed=seed, enough=enough)
    if _folded(model) and _ahead(job, against, found.x_adv, y, index):
        again = attack.perturb(job.exact()[against], x, y, job.threat, seed=seed, enough=enough)
        found = Found(again.x_adv, found.forwards + again.forwards)
    return found, enough.calls


def _folded(model: object) -> bool:
    """Whether the values that lead an attack are those of a folded network."""
    return isinstance(leaves(model)[0], fx.GraphModule)


def leaves(model: object) -> list[object]:
    """The networks and engines that a model asks in the end, those of its values first."""
    if isinstance(model, Surrogate):
        return [*leaves(model.values), *leaves(model.twin)]
    if isinstance(model, (Own, Tamed, Answers)):
        return leaves(model.net)
    return [model.engine if isinstance(model, Values) else model]


@torch.no_grad()
def _ahead(job: Job, against: str, x_adv: Tensor, y: Tensor, index: NDArray[np.int64]) -> bool:
    """Whether a folded network was fooled by an image that does not fool the judge."""
    side = job.source if against == "source" else job.engine
    fooled = np.flatnonzero((margin(job.models[against](x_adv), y) <= 0).cpu().numpy())
    if side is None or not len(fooled):
        return False
    return bool(side.judge(x_adv[fooled].cpu().numpy(), job.y[index[fooled]]).robust.any())
