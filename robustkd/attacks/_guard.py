"""A model as the attacks may see it: the defects listed for AutoAttack cannot be reached through it.

Fresh contiguous tensors, contiguous finite gradients, empty batches answered, NaN never a point for the
defender, and every tie or non-finite answer met on the way kept as a witness for the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustkd.losses import margin
from robustkd.signals import check
from robustkd.threat import SLACK, ThreatModel, per_image

#: standard deviations of its clean logits by which an image must be wrong to leave its batch: it shall also fool after
#: rounding, and through another runtime
DEPTH = 0.1
#: step of the tie-break relative to the spread of the logits, far below one unit of float32 or int8
_TIE_STEP = 1e-9


Enough = Callable[[Tensor, Tensor], Tensor]
"""Images (M, C, H, W) that fool the attacked model, and their rows in its batch (M,): which need not be searched on."""


class _CleanGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous (torch 2.14 hands back other layouts) and finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.nan_to_num(grad.contiguous(), nan=0.0, posinf=0.0, neginf=0.0)


class Guard:
    """Wraps a model for one batch of images under attack.

    Args:
        model: images to logits.
        x: the clean images of the batch; y: their labels.
        threat: the ball in which a witness must lie.
        enough: which fooling images settle their row; without it all that are wrong beyond rounding.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel, enough: Enough | None = None
    ) -> None:
        self._model, self._x, self._y, self._threat, self._enough = model, x, y, threat, enough
        self._witness = x.clone()
        self._open = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self._tie_break: Tensor | None = None
        self.forwards, self._plain = 0, False
        with torch.no_grad():
            logits = self._answer(x)
        self.classes = logits.shape[1]
        finite = logits[logits.isfinite()]
        self._spread = float(finite.double().std()) if finite.numel() > 1 else 1.0
        # of each image, not of the batch: the images beside it shall not change when it leaves
        finite_rows = logits.isfinite().all(1, keepdim=True)
        self._depth = DEPTH * torch.where(finite_rows, logits, torch.zeros_like(logits)).std(1)

    def untie(self) -> None:
        """Break exact ties from now on by class index, in the order of argmax, and answer in float64.

        Square stops at a margin of 0 (defect A9); with equal logits the lower index wins here as in argmax.
        """
        step = _TIE_STEP * max(self._spread, 1e-12)
        self._tie_break = step * torch.arange(self.classes, dtype=torch.float64, device=self._x.device)

    @torch.no_grad()
    def settled(self, z: Tensor, margins: Tensor, rows: Tensor) -> Tensor:
        """Of which rows of the batch nothing more can be learned, given images z that fool the model by these margins."""
        deep = (margins < 0) & (margins <= -self._depth[rows])
        if self._enough is not None and bool(deep.any()):
            deep[deep.clone()] = self._enough(self._threat.project(z[deep], self._x[rows[deep]]), rows[deep])
        return deep

    def __call__(self, z: Tensor) -> Tensor:
        """Logits of `z` (M, C, H, W), in rows of finite numbers; M may be 0 (defect A8)."""
        if not len(z):
            return z.new_zeros((0, self.classes), dtype=z.dtype if self._tie_break is None else torch.float64)
        logits = self._answer(z)
        if self._plain:
            logits = logits.clone()  # an attack may write into it
        else:
            finite = logits.isfinite().all(1, keepdim=True)
            logits = torch.where(finite, logits, torch.zeros_like(logits))
        return logits if self._tie_break is None else logits.double() - self._tie_break

    def _answer(self, z: Tensor) -> Tensor:
        check()
        self.forwards += len(z)
        logits = self._model(_CleanGradient.apply(z)).float()
        if torch.is_grad_enabled() and z.requires_grad and not logits.requires_grad:
            logits = logits + 0 * z.flatten(1).sum(1, keepdim=True)  # cut off: a zero gradient, not a crash (A4)
        top = logits.detach().topk(min(2, logits.shape[1]), dim=1).values
        # nothing odd in any row, seen at once: no tie at the top, and a sum that infinities and NaN would have spoilt
        self._plain = bool((top[:, 0] > top[:, -1]).all() & logits.detach().sum().isfinite())
        if not self._plain:
            self._watch(z.detach(), logits.detach())
        return logits

    @torch.no_grad()
    def _watch(self, z: Tensor, logits: Tensor) -> None:
        """Keep the first image of the ball that is answered by a tie or by no number at all.

        An attack sends any subset in any order, so the image a row belongs to is found by distance.
        """
        if not bool(self._open.any()):
            return
        top = logits.topk(2, dim=1).values
        odd = ~logits.isfinite().all(1) | (top[:, 0] == top[:, 1])
        for row in odd.nonzero().flatten().tolist():
            mine = self._open.nonzero().flatten()
            near = self._threat.distance(z[row : row + 1].expand(len(mine), *z.shape[1:]), self._x[mine])
            mine = mine[near <= self._threat.eps + SLACK]
            rows = logits[row : row + 1].expand(len(mine), -1)
            mine = mine[_broken(rows, self._y[mine])]
            self._witness[mine] = z[row]
            self._open[mine] = False

    @torch.no_grad()
    def settle(self, tried: Tensor) -> Tensor:
        """The attack's images, in the ball; where one does not fool the model but a witness does, the witness."""
        sound = per_image(tried.isfinite().flatten(1).all(1), tried)
        x_adv = self._threat.project(torch.where(sound, tried.to(self._x.dtype), self._x), self._x).detach()
        if bool(self._open.all()):
            return x_adv
        use = ~_broken(self._answer(x_adv), self._y) & ~self._open
        x_adv[use] = self._threat.project(self._witness[use], self._x[use])
        return x_adv


def _broken(logits: Tensor, y: Tensor) -> Tensor:
    """Not finite, or without a strictly positive margin."""
    return ~logits.isfinite().all(1) | ~(margin(logits, y) > 0)
