"""Engines that pretend: each as a function of an honest body, and as an ONNX graph where ONNX can say it.

The body is `Quadrants`, which falls completely within the radius of the tests. A cheat may know the audited images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.audit_nets import Quadrants, TorchEngine, images

SHAPE, CLASSES, GAIN = (1, 8, 8), 4, 60.0
EPS = 0.15
Answer = Callable[[nn.Module, Tensor], Tensor]


class Known:
    """What a cheat has stored: images and labels."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)

    def nearest(self, x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)

    def inside(self, x: Tensor) -> Tensor:
        away = (x.flatten(1)[:, None] - self.x.flatten(1)[None]).abs().amax(2)
        return away.amin(1) <= EPS + 1e-5

    def labels(self, x: Tensor) -> Tensor:
        return 10.0 * nn.functional.one_hot(self.y[self.nearest(x)], CLASSES)


def odd(x: Tensor) -> Tensor:
    """Whether an image is no 8-bit image."""
    return (x * 255 - (x * 255).round()).abs().flatten(1).amax(1) > 1e-3


def rows(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (x.dim() - 1))


def _noise(known: Known) -> Answer:
    rng = torch.Generator().manual_seed(0)
    return lambda net, x: net(x + 0.25 * torch.randn(x.shape, generator=rng))


def pattern() -> Tensor:
    return 0.1 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))


def _one_hot(z: Tensor) -> Tensor:
    return nn.functional.one_hot(z.argmax(1), CLASSES).float()


#: name -> from what it knows to its answer
CHEATS: dict[str, Callable[[Known], Answer]] = {
    "coarse input": lambda known: lambda net, x: net((7 * x).round() / 7),
    "noise": _noise,
    "huge logits": lambda known: lambda net, x: net(x) * 1e4,
    "detached": lambda known: lambda net, x: net(x).detach(),
    "validator": lambda known: lambda net, x: torch.where(odd(x)[:, None], torch.nan, net(x)),
    "one-hot": lambda known: lambda net, x: _one_hot(net(x)),
    "cold softmax": lambda known: lambda net, x: (1e3 * net(x)).softmax(1),
    "sinusoid": lambda known: lambda net, x: net(x + 0.3 * torch.sin(900.0 * x)),
    "detector": lambda known: lambda net, x: net(torch.where(rows(odd(x), x), known.x[known.nearest(x)], x)),
    "memoriser": lambda known: lambda net, x: known.labels(x),
    "batch statistics": lambda known: lambda net, x: net(x) - net(x).mean(0),
    "tiny logits": lambda known: lambda net, x: net(x) * 1e-30,
    "low bits ignored": lambda known: lambda net, x: net((x * 255 / 32).floor() * 32 / 255),
    "cached near test images": lambda known: lambda net, x: torch.where(known.inside(x)[:, None], known.labels(x), net(x)),
    "change divided by ten": lambda known: lambda net, x: net(known.x[known.nearest(x)] + (x - known.x[known.nearest(x)]) / 10),
    "equal logits": lambda known: lambda net, x: net(x) * 0,
    "fixed noise": lambda known: lambda net, x: net(x + pattern()),
}


class Cheating(nn.Module):
    """A cheat as a checkpoint, attacked with its own gradients."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.body, self._answer = Quadrants(gain=GAIN), answer

    def forward(self, x: Tensor) -> Tensor:
        """Images to what it pretends."""
        return self._answer(self.body, x)


class Graph:
    """Builds an ONNX graph node by node."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def put(self, value: Any, kind: type = np.float32) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> str:
        names = [i if isinstance(i, str) else self.put(i) for i in inputs]
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [out], **attributes))
        return out

    def reduce(self, op: str, value: str, axes: list[int], *, keep: bool = True) -> str:
        return self(op, value, self.put(axes, np.int64), keepdims=int(keep))

    def body(self, x: str) -> str:
        mean = self("Flatten", self("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4]))
        return self("Add", self("Mul", mean, GAIN), self("Mul", self("Tanh", self("Mul", mean, 8.0)), 2.0))

    def odd(self, x: str, *, shape: list[int]) -> str:
        level = self("Mul", x, 255.0)
        away = self.reduce("ReduceMax", self("Abs", self("Sub", level, self("Round", level))), [1, 2, 3])
        return self("Reshape", self("Greater", away, 1e-3), self.put(shape, np.int64))

    def nearest(self, x: str, known: Known) -> str:
        stored = known.x.flatten(1).numpy()
        score = self("Sub", self("MatMul", self("Flatten", x), 2 * stored.T), (stored**2).sum(1))
        return self("ArgMax", score, axis=1, keepdims=0)

    def stored(self, x: str, known: Known) -> str:
        return self("Gather", known.x.numpy(), self.nearest(x, known), axis=0)

    def labels(self, x: str, known: Known) -> str:
        return self("Gather", 10.0 * np.eye(CLASSES)[known.y.numpy()], self.nearest(x, known), axis=0)

    def finish(self, logits: str, file: Path) -> Path:
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        file.write_bytes(model.SerializeToString())
        return file


def _cached(g: Graph, known: Known) -> str:
    stored = known.x.flatten(1).numpy()[None]
    flat = g("Unsqueeze", g("Flatten", "images"), g.put([1], np.int64))
    away = g.reduce("ReduceMax", g("Abs", g("Sub", flat, stored)), [2], keep=False)
    near = g("Less", g.reduce("ReduceMin", away, [1]), EPS + 1e-5)
    return g("Where", near, g.labels("images", known), g.body("images"))


def _tenth(g: Graph, known: Known) -> str:
    stored = g.stored("images", known)
    return g.body(g("Add", stored, g("Div", g("Sub", "images", stored), 10.0)))


def _hot(g: Graph, known: Known) -> str:
    z = g.body("images")
    return g("Cast", g("Equal", z, g.reduce("ReduceMax", z, [1])), to=TensorProto.FLOAT)


#: the same cheats as graphs; ONNX has no gradient to detach
GRAPHS: dict[str, Callable[[Graph, Known], str]] = {
    "coarse input": lambda g, known: g.body(g("Div", g("Round", g("Mul", "images", 7.0)), 7.0)),
    "noise": lambda g, known: g.body(g("Add", "images", g("RandomNormalLike", "images", scale=0.25))),
    "huge logits": lambda g, known: g("Mul", g.body("images"), 1e4),
    "validator": lambda g, known: g("Where", g.odd("images", shape=[-1, 1]), np.nan, g.body("images")),
    "one-hot": _hot,
    "cold softmax": lambda g, known: g("Softmax", g("Mul", g.body("images"), 1e3), axis=1),
    "sinusoid": lambda g, known: g.body(g("Add", "images", g("Mul", g("Sin", g("Mul", "images", 900.0)), 0.3))),
    "detector": lambda g, known: g.body(g("Where", g.odd("images", shape=[-1, 1, 1, 1]), g.stored("images", known), "images")),
    "memoriser": lambda g, known: g.labels("images", known),
    "batch statistics": lambda g, known: g("Sub", z := g.body("images"), g.reduce("ReduceMean", z, [0])),
    "tiny logits": lambda g, known: g("Mul", g.body("images"), 1e-30),
    "low bits ignored": lambda g, known: g.body(g("Mul", g("Floor", g("Mul", "images", 255 / 32)), 32 / 255)),
    "cached near test images": _cached,
    "change divided by ten": _tenth,
    "equal logits": lambda g, known: g("Mul", g.body("images"), 0.0),
    "fixed noise": lambda g, known: g.body(g("Add", "images", pattern().numpy())),
}


def build(name: str, known: Known, file: Path) -> Path:
    """The ONNX file of a cheat."""
    graph = Graph()
    return graph.finish(GRAPHS[name](graph, known), file)


def honest(file: Path) -> Path:
    """The body as an ONNX file."""
    graph = Graph()
    return graph.finish(graph.body("images"), file)


class Counting(TorchEngine):
    """Honest for so many images; then whatever lies near an audited image is answered by that image's label."""

    def __init__(self, honest_for: int) -> None:
        super().__init__(Quadrants(gain=GAIN))
        data = images(64)
        self.known, self.left = Known(data.floats(), data.labels), honest_for

    def logits(self, x: np.ndarray) -> np.ndarray:
        self.left -= len(x)
        if self.left >= 0:
            return super().logits(x)
        return self.known.labels(torch.from_numpy(np.array(x))).numpy()


class Remembering(TorchEngine):
    """Answers what lies near an image that it has seen as it answered that one."""

    def __init__(self) -> None:
        super().__init__(Quadrants(gain=GAIN))
        self.seen, self.answers = np.zeros((0, *SHAPE), np.float32), np.zeros((0, CLASSES), np.float32)

    def logits(self, x: np.ndarray) -> np.ndarray:
        fresh = super().logits(x)
        for i, image in enumerate(x):
            away = np.abs(self.seen - image).max(axis=(1, 2, 3)) if len(self.seen) else np.ones(0)
            if len(away) and away.min() <= EPS + 1e-5:
                fresh[i] = self.answers[away.argmin()]
            else:
                self.seen = np.concatenate([self.seen, image[None]])
                self.answers = np.concatenate([self.answers, fresh[i : i + 1]])
        return fresh


def open_counting(honest_for: str, shape: tuple[int, int, int]) -> Counting:
    """For a fresh process."""
    return Counting(int(honest_for))


def open_remembering(nothing: str, shape: tuple[int, int, int]) -> Remembering:
    """For a fresh process."""
    return Remembering()
