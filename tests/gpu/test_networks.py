"""Every architecture of the shelf on the device: the CPU's logits, and the CPU's gradient of the images."""

from typing import Any

import pytest
import torch
from torch import nn

from robustkd.catalog import Shelf
from robustkd.engines.pytorch import device_of

TOLERANCE = 1e-4
"""Of the largest logit, or of the largest gradient, in float32 without TF32."""
NARROW: dict[str, dict[str, Any]] = {
    "wide-resnet": {"depth": 10, "widen_factor": 1},
    "deepmind-wrn": {"depth": 10, "widen_factor": 1},
    "hypersphere-wrn": {"depth": 10, "widen_factor": 1},
    "cifar-resnet": {"depth": 20},
}
SIDE = {"resnet18-imagenet": 64, "mobilenet-v2-imagenet": 64}
ELSEWHERE = {"timm"}
"""Networks of a package that need not be here."""


def narrow(name: str) -> nn.Module:
    """A network of the shelf as narrow as it can be told to be, its running statistics not those of a fresh one."""
    config = Shelf("models").get(name)
    knobs = NARROW.get(name, {"width": 0.125} if config.model_fields.get("width", None) is not None else {})
    torch.manual_seed(0)
    net: nn.Module = config(**knobs).build(channels=3, classes=10)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, 3, SIDE.get(name, 32), SIDE.get(name, 32)))
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("name", [name for name in Shelf("models").names() if name not in ELSEWHERE])
def test_logits_and_gradients_are_the_cpus(name: str, device: str, plain: Any) -> None:
    net, side = narrow(name), SIDE.get(name, 32)
    x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    with plain():
        wanted = answered(net, x)
    net = net.to(device)
    assert device_of(net).type == device
    for got, want in zip(answered(net, x.to(device)), wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=TOLERANCE * float(want.abs().max()))


def answered(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of their cross entropy with respect to the images."""
    z = x.clone().requires_grad_(True)
    logits = net(z)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(x), device=x.device), reduction="sum")
    return logits.detach(), torch.autograd.grad(loss, z)[0]
