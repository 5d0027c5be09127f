"""The training loop, readable as the papers write it; Accelerate launches, wraps and reduces, nothing more.

For each batch: search x_adv on the bare student, take the method's loss on the wrapped one, step, advance the
method's state on terms averaged over all processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkd.ascent import ascend, attacking
from robustkd.datasets._base import ImageSet
from robustkd.errors import NumericsError
from robustkd.heap import kept
from robustkd.methods._base import Batch, Clock, Method, Nets, Terms
from robustkd.methods._memo import remembering
from robustkd.models._base import check_takes
from robustkd.models._files import portable
from robustkd.models._fold import folded, frozen
from robustkd.recipe.schema import Precision, Recipe
from robustkd.signals import check
from robustkd.training import checkpoint
from robustkd.training.addons import Addons
from robustkd.training.batches import ATTACK, Batches
from robustkd.training.evaluate import Accuracy, evaluate
from robustkd.training.log import Log
from robustkd.training.recompute import Recompute
from robustkd.training.schedule import rate
from robustkd.training.seeds import generator, seed_of
from robustkd.training.team import Team

Listen = Callable[[dict[str, Any]], None]
LOG_EVERY = 10


class Loop:
    """One run: everything that lasts from its first step to its last."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        train: ImageSet,
        held: ImageSet,
        teachers: dict[Any, nn.Module],
        team: Team,
        folder: Path,
        start: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.recipe, self.folder, self.team, self.place = recipe, folder, team, team.place
        device = self.place.device
        torch.manual_seed(seed_of(recipe.seed) % 2**63)
        channels, classes = train.shape[0], len(train.classes)
        net = recipe.student.build(channels=channels, classes=classes)
        if not (folder / "state.safetensors").is_file():  # a state that will be resumed is further on
            recipe.student.begin(net, channels=channels, classes=classes)
        if start is not None:
            start(net)
        self.student: nn.Module = net.to(device).to(memory_format=torch.channels_last)
        check_takes(self.student, train.shape, recipe.student.architecture)
        knobs = recipe.train
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=knobs.lr,
            momentum=knobs.momentum,
            nesterov=knobs.nesterov,
            weight_decay=knobs.weight_decay,
        )
        self.wrapped = self.student
        self.method: Method[Any, Any] = recipe.method_class()(recipe.method, classes=classes)
        self.teachers, self.held = teachers, held
        self._fast = folded(self.student) if knobs.speed == "auto" else None
        self._recompute = Recompute().graphs if knobs.speed == "auto" else nullcontext
        if knobs.speed == "auto":  # they are frozen: what is folded now stays right
            images = -(-knobs.batch_size // self.place.world)
            self.teachers = {role: frozen(net, images=images) for role, net in teachers.items()}
        data = recipe.dataset
        self.batches = Batches(train, knobs, seed=recipe.seed, place=self.place, stream=data.stream, workers=data.workers)
        self.addons = Addons(
            recipe.addons, self.method, self.student, team=team, steps=self.batches.steps, autocast=self._autocast
        )
        self.progress = checkpoint.Progress(threads=torch.get_num_threads())
        self.best: dict[str, Tensor] = {}
        self.state = self.method.init()

    def resume(self) -> None:
        """Go back to the saved state."""
        self.best, self.progress = checkpoint.restore(
            self.folder / "state.safetensors", self.student, self.optimizer, self.addons.average
        )
        self.state = self.method.restore(self.progress.method_state)

    def run(self, listen: Listen) -> None:
        """Train to the end; a signal stops it at a step, with the state saved.

        Raises:
            NumericsError: the loss is not finite; the last good state stays.
            Interrupted: a signal asked for a stop.
        """
        self.wrapped = self.team.wrap(self.student)
        board = self.folder / "tensorboard" if self.recipe.train.tensorboard and self.team.main else None
        log_file = self.folder / "metrics.jsonl" if self.team.main else None
        keep = kept() if self.recipe.train.speed == "auto" else nullcontext()
        with keep, Log(log_file, tensorboard=board, keep=self.progress.metrics_bytes) as log:
            began = time.perf_counter() - self.progress.seconds
            while self.progress.epoch < self.recipe.train.epochs:
                self._epoch(log, listen, began)

    def _epoch(self, log: Log, listen: Listen, began: float) -> None:
        epoch, knobs = self.progress.epoch, self.recipe.train
        for step, x, y in self.batches.epoch(epoch, first=self.progress.step):
            clock = Clock(epoch, knobs.epochs, epoch * self.batches.steps + step)
            save = (step + 1) % knobs.save_every == 0
            # a state to be saved was looked at before, so that it is never one that has diverged
            report = step % LOG_EVERY == 0 or step + 1 == self.batches.steps or save
            values = self.step(x, y, clock, report=report)
            self.progress.step = step + 1
            self.progress.seconds = time.perf_counter() - began
            if report:
                log.write(clock.step, values)
            listen({"event": "step", "clock": clock, "steps": self.batches.steps, **values})
            # every process has to know of a signal before one stops: asking costs a wait, so a team asks now and then
            stop = (report or self.team.alone) and self.team.asked_to_stop()
            if save or stop:
                self._save(log)
                self.team.check()
        due = epoch + 1 == knobs.epochs or (epoch + 1) % knobs.select_every == 0
        if due:
            self._settle(epoch)
        if due and len(self.held):
            accuracy = self._select()
            values = {"epoch": epoch, "clean_accuracy": accuracy.clean, "robust_accuracy": accuracy.robust}
            log.write((epoch + 1) * self.batches.steps - 1, values)
            listen({"event": "evaluation", **values, "seconds": time.perf_counter() - began})
        self.progress.epoch, self.progress.step = epoch + 1, 0
        self.progress.seconds = time.perf_counter() - began
        self._save(log)
        self.team.check()

    def step(self, x: Tensor, y: Tensor, clock: Clock, *, report: bool) -> dict[str, Any]:
        """One optimiser step; the numbers to log (loss terms only when `report`, to spare a GPU the wait)."""
        x = x.contiguous(memory_format=torch.channels_last)
        began = self._now(report)
        nets = remembering(self.student, self.teachers)
        x_adv = self._attack(nets, x, y, clock) if self.method.adversarial else x
        attacked = self._now(report)
        self.student.train()
        lr = self._set_rate(clock)
        clock = replace(clock, lr_scale=lr / self.recipe.train.lr)
        outer, nets = self.addons.outer, replace(nets, student=self.wrapped)
        around = self.addons.around(nets, Batch(x, y, x_adv), self.state, clock)
        with self._recompute(), around as (nets, batch, seen):
            with self._autocast():
                parts, terms = outer.loss(nets, batch, self.state, clock)
            terms = self.team.mean({"loss": parts.detach(), **terms, **seen})
            self.state = self.method.advance(self.state, terms, clock)
            terms["loss"] = outer.weigh(terms["loss"], self.state)
            if self.place.device.type == "cpu" or report:
                self._finite(terms, clock)
            self.optimizer.zero_grad(set_to_none=True)
            self.team.backward(outer.weigh(parts, self.state))
            if (limit := self.recipe.train.grad_clip) is not None:
                nn.utils.clip_grad_norm_(self.student.parameters(), limit)
            self.optimizer.step()
        if not report:
            return {"epoch": clock.epoch}
        ended = self._now(report)
        seconds = ended - began
        return {
            "epoch": clock.epoch,
            "lr": lr,
            **{name: float(value) for name, value in terms.items()},
            **self.method.gauges(self.state),
            "images_per_s": len(x) * self.place.world / seconds,
            "inner_share": (attacked - began) / seconds,
        }

    def _attack(self, nets: Nets, x: Tensor, y: Tensor, clock: Clock) -> Tensor:
        inner, method = self.recipe.inner, self.method
        mode = inner.batch_norm or method.attack_mode
        if self._fast is not None and mode == "eval":
            nets = replace(nets, student=self._fast.refreshed())
        rng = generator(self.recipe.seed, clock.epoch, clock.step, self.place.rank, ATTACK, device=self.place.device)
        with attacking(self.student, mode), self._autocast(inner.precision):
            return ascend(
                method.inner(nets, x, y),
                x,
                threat=self.recipe.search_threat(),
                steps=inner.steps,
                step_size=inner.step_size,
                start=inner.start or method.start,
                rng=rng,
            )

    def _autocast(self, precision: Precision | None = None) -> torch.autocast:
        """The outer problem's, unless told; the search has its own, for bf16 turns signs of small gradients."""
        enabled = (precision or self.recipe.train.precision) == "bf16"
        return torch.autocast(self.place.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _set_rate(self, clock: Clock) -> float:
        knobs = self.recipe.train
        lr = rate(knobs.schedule, knobs.lr, epoch=clock.step / self.batches.steps, epochs=knobs.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _finite(self, terms: Terms, clock: Clock) -> None:
        if math.isfinite(float(terms["loss"])):
            return
        broken = [name for name, value in terms.items() if not math.isfinite(float(value))]
        first = next((name for name in broken if name != "loss"), "loss")  # the term says more than their sum
        error = NumericsError(
            f"training diverged: {first} is {float(terms[first])} in step {clock.step} (epoch {clock.epoch})",
            where=f"method {self.recipe.method.name}",
            fix=f"lower train.lr (it is {self.recipe.train.lr:g}); the last good state is in {self.folder}",
        )
        raise self.team.everywhere(error)

    def _now(self, exact: bool) -> float:
        if exact and self.place.device.type == "cuda":
            torch.cuda.synchronize(self.place.device)
        return time.perf_counter()

    def _settle(self, epoch: int) -> None:
        """Make the network that is measured ready for it; some averages need the epoch's images once more."""

        def images() -> Iterator[Tensor]:
            for _, x, _ in self.batches.epoch(epoch):
                check()
                yield x.contiguous(memory_format=torch.channels_last)

        with self.team.agreed():
            self.addons.settle(images())
        self.team.average_statistics(*self.addons.nets)

    def _select(self) -> Accuracy:
        """Measure on the held-out images, and keep the student (or its average) if it is the best so far."""
        threat, seed, net = self.recipe.threat, self.recipe.seed, self.addons.outcome
        with self.team.agreed():
            quick = self._fast.refreshed() if self._fast is not None and net is self.student else None
            accuracy = evaluate(net, self.held, threat, seed=seed, device=self.place.device, quick=quick)
        self.progress.last = asdict(accuracy) | {"epoch": self.progress.epoch}
        score = accuracy.score(self.recipe.train.select)
        if score > self.progress.best_score or not self.best:
            self.progress.best_score, self.progress.best = score, self.progress.last
            self.best = portable(net)
        return accuracy

    def _save(self, log: Log) -> None:
        self.team.average_statistics(*self.addons.nets)
        self.progress.method_state = self.method.save(self.state)
        with self.team.agreed():
            self.progress.metrics_bytes = log.flush()
            if self.team.main:
                file = self.folder / "state.safetensors"
                checkpoint.save(file, self.student, self.optimizer, self.best, self.progress, self.addons.average)
