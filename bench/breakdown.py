"""`python -m bench breakdown [--case dgad/mnv2/resnet-18] [--json]`: where the time of a training step goes.

The real step runs with hooks on student and teachers: a forward pass is timed around the module, a backward pass from the
gradient that reaches its logits to the one that leaves its images. What the outer loss sends back through the student is
the whole of that backward pass. `rest` is what remains of the step: losses, the update of the images, the copies of
folded weights. Waiting for the device at every mark makes a GPU's step longer than it is; shares are what to read.

The limit is a product of two large matrices or a 3x3 convolution of 256 channels on the same device, in the precision of
the step, whichever does more (on some CPUs one library is quicker than the other); a part's rate is held against it.
Depthwise convolutions and small images cannot come near it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from bench.__main__ import RESULTS, environment, write
from bench.place import Place
from bench.sizes import QUICKSTART, STUDENTS, TEACHERS, Size, paper
from bench.step import CLOCK, Pair
from robustkd.models._macs import giga_macs

DATA, UPDATE, REST, WHOLE = "data", "update", "rest", "student backward to the weights"
#: passes of a network that its part stands for: a gradient to the images is one forward's work, a full backward two
WORK = {
    "forward, attack": 1,
    "backward to the images": 1,
    "forward": 1,
    "backward to the weights": 2,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench breakdown", description="Where the time of a training step goes.")
    parser.add_argument("--case", default="dgad/mnv2/resnet-18", help="method/student/teacher; method/quickstart")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="left out, that of `bench step`")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "bf16-attack"))
    parser.add_argument("--speed", default="auto", choices=("auto", "safe"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    asked = parser.parse_args(argv)
    where = environment(quick=False, device=asked.device)
    place = Place(asked.device, asked.precision, asked.speed)
    method, size = parse(asked.case, place.device)
    if asked.batch:
        size = Size(**{**vars(size), "batch": asked.batch})
    found = {"rows": rows(method, size, place, asked.repeats), "environment": where}
    odd = [part for part, usual in ((place.device, "cpu"), (place.precision, "fp32"), (place.speed, "auto")) if part != usual]
    write(RESULTS / ("-".join(["breakdown", *asked.case.split("/"), *odd]) + ".json"), found)
    print(json.dumps(found) if asked.json else table(asked.case, size, found))
    return 0


def parse(case: str, device: str) -> tuple[str, Size]:
    """Method and size of a case; a method without a teacher needs none."""
    method, _, nets = case.partition("/")
    if nets == "quickstart":
        return method, QUICKSTART
    student, _, teacher = nets.partition("/")
    if student not in STUDENTS or (teacher or "resnet-18") not in TEACHERS:
        raise SystemExit(f"{case} is not method/student/teacher with {', '.join(STUDENTS)} and {', '.join(TEACHERS)}")
    return method, paper(student, teacher or "resnet-18", device=device)


def rows(method: str, size: Size, place: Place, repeats: int) -> list[dict[str, Any]]:
    """The parts of a step, the longest first: seconds (median), share of the step, work, and rate over the limit."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(method, size, Path(folder), place=place)
        macs = _macs(pair, size)
        pair.ours()
        marks = Marks(place.settle)
        with marks.on(pair):
            limit = attainable(place)
            steps = [_one(pair, marks) for _ in range(repeats)]
            limit = max(limit, attainable(place))
    parts = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]}
    whole = sum(parts.values())
    told = []
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        net, _, what = name.partition(" ")
        work = macs.get(net, 0.0) * size.batch * marks.passes(name, repeats) * WORK.get(what, 0)
        rate = work / seconds if work and seconds else None
        told.append(
            {
                "case": f"{pair.case}/{name}",
                "seconds": seconds,
                "share": seconds / whole,
                "gmacs": work or None,
                "gmacs_per_s": rate,
                "of_attainable": rate / limit if rate else None,
            }
        )
    return told


def _macs(pair: Pair, size: Size) -> dict[str, float]:
    shape = (size.channels, size.pixels, size.pixels)
    recipe = pair.loop.recipe
    found = {"student": giga_macs(recipe.student, shape, 10)}
    for teacher in recipe.teachers:
        assert teacher.model is not None  # `recipe_for` gives one
        found[_called(teacher.role, pair)] = giga_macs(teacher.model, shape, 10)
    return found


def _called(role: str, pair: Pair) -> str:
    return "teacher" if len(pair.loop.teachers) == 1 else f"{role}-teacher"


def _one(pair: Pair, marks: Marks) -> dict[str, float]:
    marks.spent.clear()
    began = marks.now()
    for _ in pair.loop.batches.epoch(0):
        pass
    data, began = marks.now() - began, marks.now()
    pair.loop.step(pair.x, pair.y, CLOCK, report=False)
    whole = marks.now() - began
    return {**marks.spent, DATA: data, REST: whole - sum(marks.spent.values())}


class Marks:
    """Seconds by part, noted by hooks."""

    def __init__(self, settle: Callable[[], object]) -> None:
        self._settle = settle
        self.spent: dict[str, float] = defaultdict(float)
        self._began: dict[str, float] = {}
        self._calls: dict[str, int] = defaultdict(int)

    def now(self) -> float:
        """Seconds, once the device has done what it was asked."""
        self._settle()
        return time.perf_counter()

    def passes(self, name: str, repeats: int) -> float:
        """How often a part came in a step."""
        return self._calls[name] / repeats

    @contextmanager
    def on(self, pair: Pair) -> Iterator[None]:
        """Watch the networks, the backward pass and the optimiser of a loop."""
        loop, handles = pair.loop, []
        fast = getattr(loop, "_fast", None)  # the student of the attack, where batch norms are folded
        for name, net in [
            ("student", loop.student),
            *([("student", fast.refreshed())] if fast is not None else []),
            *((_called(role, pair), net) for role, net in loop.teachers.items()),
        ]:
            handles += self._watch(name, net)
        backward, update = loop.team.backward, loop.optimizer.step
        loop.team.backward = self._timed(WHOLE, backward)  # type: ignore[method-assign]
        loop.optimizer.step = self._timed(UPDATE, update)  # type: ignore[method-assign]
        try:
            yield
        finally:
            loop.team.backward, loop.optimizer.step = backward, update  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()

    def _watch(self, name: str, net: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            if x.requires_grad and torch.is_grad_enabled():
                x = x.view_as(x)  # a tensor of its own, whose gradient is this network's alone
                x.register_hook(lambda grad: self._close(f"{name} backward to the images"))  # type: ignore[no-untyped-call]
            self._began[name] = self.now()
            return (x, *args[1:])

        def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            searching = args[0].requires_grad and torch.is_grad_enabled()
            self._note(f"{name} forward, attack" if searching else f"{name} forward", self._began[name])
            if out.requires_grad and not searching:
                self._calls[WHOLE] += 1  # one backward pass goes through all of them
            if searching and out.requires_grad:
                out.register_hook(lambda grad: self._open(f"{name} backward to the images"))  # type: ignore[no-untyped-call]

        return [net.register_forward_pre_hook(before), net.register_forward_hook(after)]

    def _open(self, part: str) -> None:
        self._began[part] = self.now()

    def _close(self, part: str) -> None:
        self._note(part, self._began[part])

    def _note(self, part: str, began: float) -> None:
        self.spent[part] += self.now() - began
        if part != WHOLE:
            self._calls[part] += 1

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            began = self.now()
            answer = call(*args, **more)
            self._note(part, began)
            return answer

        return run


def attainable(place: Place) -> float:
    """10^9 multiply-accumulates a second on this device: of a large matrix product or a convolution, whichever does more."""
    cpu, kind = place.device == "cpu", torch.float32 if place.precision == "fp32" else torch.bfloat16
    n, images = (1536, 16) if cpu else (8192, 1024)
    a, b = (torch.rand(n, n, device=place.device, dtype=kind) for _ in "ab")
    x = torch.rand(images, 256, 16, 16, device=place.device, dtype=kind).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(256, 256, 3, 3, device=place.device, dtype=kind).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        product = n**3 / _fastest(lambda: a @ b, place)
        convolution = images * 256 * 256 * 9 * 16 * 16 / _fastest(lambda: conv2d(x, weight, padding=1), place)
    return max(product, convolution) / 1e9


def _fastest(call: Callable[[], Tensor], place: Place) -> float:
    """Seconds of the best of ten calls."""
    times = []
    for _ in range(10):
        place.settle()
        began = time.perf_counter()
        call()
        place.settle()
        times.append(time.perf_counter() - began)
    return min(times)


def table(case: str, size: Size, found: dict[str, Any]) -> str:
    """The parts for people."""
    where = found["environment"]
    whole = sum(row["seconds"] for row in found["rows"])
    lines = [
        f"{case}, batch {size.batch}, {size.steps} attack steps: {1000 * whole:.1f} ms; "
        f"{where['hardware']['cpu']}, {where['threads']} threads, torch {where['versions'].get('torch')}, "
        f"load before {where['load_before']}",
        f"{'part':36s} {'ms':>9s} {'share':>6s} {'GMACs':>8s} {'GMAC/s':>8s} {'of limit':>8s}",
    ]
    for row in found["rows"]:
        part = row["case"].rpartition("/")[2]
        work = f"{row['gmacs']:8.2f} {row['gmacs_per_s']:8.1f} {row['of_attainable']:8.0%}" if row["gmacs"] else ""
        lines.append(f"{part:36s} {1000 * row['seconds']:9.1f} {row['share']:6.1%} {work}".rstrip())
    return "\n".join(lines)
