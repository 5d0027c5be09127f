"""The answers of a network in memory through ONNX Runtime, wherever nobody wants a gradient of them.

Square and FAB-T ask thousands of times for answers alone, a few dozen images at a time. There torch pays for every operator
anew; a session has its operators joined and its weights laid out. An image's answer is the same bits in any batch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from robustkd.engines.ort import open_session
from robustkd.engines.pytorch import device_of
from robustkd.models._winograd import within

INPUT, OUTPUT = "images", "logits"
OPSET = 17


class Answers(nn.Module):
    """A network: gradients by torch, answers without them by ONNX Runtime.

    Args:
        net: (N, C, H, W) to logits (N, K), float32 on the CPU.
        session: of the same network.
    """

    def __init__(self, net: nn.Module, session: Any) -> None:
        super().__init__()
        self.net, self._session = net, session

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        if x.requires_grad and torch.is_grad_enabled():
            logits: Tensor = self.net(x)
            return logits
        (scores,) = self._session.run(None, {INPUT: x.detach().contiguous().numpy()})
        return torch.from_numpy(scores)


def answers(net: nn.Module, x: Tensor, threads: Callable[[nn.Module], int]) -> nn.Module:
    """The network with its answers by ONNX Runtime; itself where torch is quicker, or there is no such session.

    Args:
        net: what `frozen` made of a network.
        x: some images.
        threads: of the session; only asked for where there will be one.
    """
    if not isinstance(net, fx.GraphModule) or device_of(net).type != "cpu" or x.dtype != torch.float32:
        return net
    if within(net):
        return net  # a quarter of the multiplications
    try:
        return Answers(net, open_session(_exported(net, x), threads=threads(net)))
    except Exception:  # the exporter and the runtime fail with whatever an operator does to them
        return net


def _exported(net: nn.Module, x: Tensor) -> bytes:
    """A graph for this process alone: by the tracing exporter, which takes a twentieth of the other's time."""
    file: Any = io.BytesIO()
    free = {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (x[:2],),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: free, OUTPUT: free},
        )
    model: bytes = file.getvalue()
    return model
