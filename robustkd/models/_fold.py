"""Batch normalisation folded into the convolution before it, while the network's own weights keep moving.

In eval mode a batch norm is a scale and a shift of each channel: w' = w g / sqrt(v + e), b' = (b - m) g / sqrt(v + e) + s.
An attack asks the same weights for gradients at many images; folded once, it need not pay for the batch norms each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from robustkd.models._winograd import Winograd, suits

FROZEN = "frozen"
"""In the `meta` of what `frozen` made."""
MANY = 64
"""Images at a time where nothing is said of them."""
LARGE = 2**25
"""Bytes of an answer from which where it is positive is kept, a quarter of it; of a smaller one that takes longer."""


def _line(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does to each channel in eval mode: scale and shift, (C,)."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # it was looked for
    return line(mean, (variance + norm.eps).rsqrt(), norm.weight, norm.bias)


def line(mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What normalising does to each channel: scale and shift, (C,), from its mean and one over its standard deviation."""
    scale = inverse if weight is None else inverse * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


class _Convolution(nn.Module):
    """A convolution with the batch norm after it, as one."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self._of = (conv, norm)  # a tuple: they stay modules of the network, not of this one
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold the weights as they are now."""
        conv, norm = self._of
        scale, shift = _line(norm)
        self.weight = conv.weight * scale[:, None, None, None]
        self.bias = shift if conv.bias is None else conv.bias * scale + shift

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        answer: Tensor = self._of[0]._conv_forward(x, self.weight, self.bias)
        return answer


class _Gate(torch.autograd.Function):
    """A batch norm in eval mode and a ReLU as one, which keeps the answer alone for its gradient to the images, or less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = torch.addcmul(shift, x, scale).relu_()
        ctx.save_for_backward(y > 0 if y.nbytes >= LARGE else y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        kept, scale = ctx.saved_tensors
        gated = grad * kept if kept.dtype == torch.bool else torch.ops.aten.threshold_backward(grad, kept, 0)
        return gated.mul_(scale), None, None


class _Gated(nn.Module):
    """A batch norm that no convolution precedes, with the ReLU after it; its weights no longer move."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self._norm = norm
        scale, shift = _line(norm)
        self._scale, self._shift = scale.detach()[:, None, None], shift.detach()[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if x.dtype != self._scale.dtype or torch.is_autocast_enabled(x.device.type):
            return F.relu(self._norm(x))
        found: Tensor = _Gate.apply(x, self._scale, self._shift)
        return found


class Folded:
    """The eval mode of a network, computed with folded weights."""

    def __init__(self, net: nn.Module, graph: fx.GraphModule, parts: tuple[_Convolution, ...]) -> None:
        self.net, self._graph, self._parts = net, graph, parts

    def refreshed(self) -> nn.Module:
        """The folded network with the weights and statistics that the network has now; gradients are the images' alone."""
        for part in self._parts:
            part.refresh()
        return self._graph


def folded(net: nn.Module) -> Folded | None:
    """Fold what can be folded; None where the network cannot be traced, or has nothing to fold.

    Args:
        net: images (N, C, H, W) to logits (N, K); it is left as it is, and shares all other modules with the folded one.
    """
    before = [(module, module.training) for module in net.modules()]
    try:
        graph = fx.symbolic_trace(net.eval())
    except Exception:  # tracing fails with whatever the network does to a proxy
        return None
    finally:
        for module, training in before:
            module.training = training
    modules = dict(graph.named_modules())
    parts: list[_Convolution] = []
    for node in list(graph.graph.nodes):
        if (conv := _foldable(node, modules)) is None:
            continue
        part = _Convolution(modules[conv.target], modules[node.target])
        name = f"folded_{len(parts)}"
        graph.add_submodule(name, part)
        conv.target = name
        node.replace_all_uses_with(conv)
        graph.graph.erase_node(node)
        parts.append(part)
    if not parts:
        return None
    graph.delete_all_unused_submodules()
    graph.recompile()
    return Folded(net, graph, tuple(parts))


def frozen(net: nn.Module, *, images: int = MANY) -> nn.Module:
    """A network whose weights no longer move, in eval mode, as fast as it can be had: folded once, or itself.

    On a CPU its wide 3x3 convolutions have their weights transformed (`_winograd`), which takes memory: four times theirs,
    and as much again once a gradient is asked for.

    Args:
        net: images (N, C, H, W) to logits (N, K); it is left as it is.
        images: usually asked about at a time; too few of them are not worth that memory.
    """
    fold = folded(net)
    if fold is None:
        return net
    quick = fold.refreshed().eval().requires_grad_(False)
    for part in quick.modules():
        if isinstance(part, _Convolution) and part.weight.device.type == "cpu":
            part.weight = part.weight.contiguous(memory_format=torch.channels_last)  # whatever the images' layout
    _gate(quick)
    for name, module in list(quick.named_modules()):
        if (better := _better(module, images)) is not None:
            parent, _, own = name.rpartition(".")
            setattr(quick.get_submodule(parent), own, better)
    assert isinstance(quick, fx.GraphModule)
    quick.meta[FROZEN] = True
    return quick


def _gate(graph: nn.Module) -> None:
    """Put a gate in place of each batch norm that is left and read by a ReLU alone."""
    assert isinstance(graph, fx.GraphModule)
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(norm) is not nn.BatchNorm2d or norm.running_var is None or len(node.users) != 1:
            continue
        (user,) = node.users
        if not _is_relu(user, modules):
            continue
        graph.add_submodule(name := f"gated_{node.name}", _Gated(norm))
        node.target = name
        user.replace_all_uses_with(node)
        graph.graph.erase_node(user)
    graph.recompile()


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return node.target in (F.relu, torch.relu, "relu", "relu_")


def _better(module: nn.Module, images: int) -> Winograd | None:
    conv = module._of[0] if isinstance(module, _Convolution) else module
    if not isinstance(conv, nn.Conv2d):
        return None
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return Winograd(weight, bias, images=images) if suits(conv, weight) else None


def _foldable(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """The node of the convolution that a batch norm's node can be folded into: used once, by it, and called but once."""
    if node.op != "call_module" or type(norm := modules[str(node.target)]) is not nn.BatchNorm2d:
        return None
    conv = node.args[0]
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return None
    calls = sum(other.target == conv.target for other in node.graph.nodes)
    if type(modules.get(str(conv.target))) is not nn.Conv2d or calls > 1 or norm.running_var is None:
        return None
    return conv
