"""Teacher architectures: the quirks of published robust networks (methods.md, section 8), each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from robustkd.errors import ArtifactError
from robustkd.models._base import bare
from robustkd.models._deepmind import padded, swish
from robustkd.models._files import load_state, portable, read_state
from tests.unit.test_models import SMALL, build, every

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
COUNTS = [
    ("deepmind-wrn", {"depth": 70, "widen_factor": 16}, 10, 266_796_506),
    ("deepmind-wrn", {"depth": 70, "widen_factor": 16}, 100, 266_888_756),
    ("deepmind-wrn", {"depth": 94, "widen_factor": 16}, 10, 365_915_610),
    ("deepmind-wrn", {"depth": 82, "widen_factor": 8}, 10, 79_125_466),
    # where the shortcuts are is the only difference to the plain networks, and there is none in the counts
    ("deepmind-wrn", {"depth": 28, "widen_factor": 10}, 10, 36_479_194),
    ("deepmind-wrn", {"depth": 34, "widen_factor": 10}, 10, 46_160_474),
    ("deepmind-wrn", {"depth": 34, "widen_factor": 20}, 10, 184_531_674),
    ("deepmind-preact-resnet", {}, 10, 12_548_426),
    ("deepmind-preact-resnet", {}, 100, 12_594_596),
    # the plain network without its ten biases
    ("hypersphere-wrn", {"depth": 34, "widen_factor": 20}, 10, 184_531_664),
    ("resnet34", {}, 10, 21_282_122),
    ("resnet50", {}, 10, 23_520_842),
]


@pytest.mark.parametrize(("name", "knobs", "classes", "parameters"), COUNTS)
def test_parameter_counts(name: str, knobs: dict[str, Any], classes: int, parameters: int) -> None:
    with torch.device("meta"):
        net = build(name, classes=classes, **knobs)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("depth", [9, 29, 112])
@pytest.mark.parametrize("name", ["deepmind-wrn", "hypersphere-wrn"])
def test_wide_networks_of_other_depths_are_refused(name: str, depth: int) -> None:
    with pytest.raises(ValueError, match=r"6n \+ 4|less than or equal|greater than or equal"):
        build(name, depth=depth)


# --- files


@every
def test_a_network_survives_its_file(name: str, tmp_path: Path) -> None:
    """Bit for bit, statistics of batch norm included; the constants in front are not in the file."""
    torch.manual_seed(0)
    knobs: dict[str, Any] = {**SMALL[name], "normalize": CIFAR10}
    net = build(name, **knobs)
    x = torch.rand(4, 3, 32, 32)
    net.train()(x)  # running statistics that are not the initial ones
    save_file(portable(net), tmp_path / "net.safetensors")
    state = read_state(tmp_path / "net.safetensors")
    assert not {"mean", "std", "mu", "sigma"} & {key.rpartition(".")[2] for key in state}
    twin = build(name, **knobs)
    load_state(twin, state, "net.safetensors")
    with torch.no_grad():
        assert torch.equal(net.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name", ["wide-resnet", "hypersphere-wrn"])
@pytest.mark.parametrize("held", [True, False])
def test_the_unused_group_is_in_the_file_or_loading_fails(name: str, held: bool) -> None:
    state = build(name, sub_block1=held, **SMALL[name]).state_dict()
    load_state(build(name, sub_block1=held, **SMALL[name]), state, "net.pt")
    with pytest.raises(ArtifactError, match=r"sub_block1\.layer\.0"):
        load_state(build(name, sub_block1=not held, **SMALL[name]), state, "net.pt")


@pytest.mark.parametrize("pair", [("wide-resnet", "hypersphere-wrn"), ("wide-resnet", "deepmind-wrn")])
def test_relatives_do_not_load_into_each_other(pair: tuple[str, str]) -> None:
    one, other = (build(name, **SMALL[name]) for name in pair)
    for target, source in ((one, other), (other, one)):
        with pytest.raises(ArtifactError):
            load_state(target, source.state_dict(), "net.pt")


# --- DeepMind style


def test_swish_is_the_published_function() -> None:
    """Value and derivative of x sigmoid(x), written out: s (1 + x (1 - s))."""
    x = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(swish(x).sum(), x)
    s = 1 / (1 + (-x.detach()).exp())
    assert torch.allclose(swish(x.detach()), x.detach() * s, atol=1e-12)
    assert torch.allclose(slope, s * (1 + x.detach() * (1 - s)), atol=1e-12)


def rounds(x: Tensor, size: int) -> Tensor:
    """The sum over each 3x3 window of a stride-2 convolution whose top left corner is on the even pixels."""
    image = F.pad(x, (0, 3, 0, 3))
    return torch.stack(
        [torch.stack([image[..., 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].sum() for j in range(size)]) for i in range(size)]
    )


def test_a_strided_convolution_is_padded_right_and_below() -> None:
    """By hand: of 0..15 in 4x4, the windows begin at (0, 0), (0, 2), (2, 0), (2, 2)."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out = F.conv2d(padded(x, 2), torch.ones(1, 1, 3, 3), stride=2)
    assert out.flatten().tolist() == [45.0, 39.0, 66.0, 50.0]
    assert torch.equal(out[0, 0], rounds(x, 2))
    symmetric = F.conv2d(x, torch.ones(1, 1, 3, 3), stride=2, padding=1)
    assert symmetric.flatten().tolist() == [10.0, 24.0, 51.0, 90.0], "what a forgotten quirk gives"
    assert torch.equal(padded(x, 1), F.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize("size", [28, 32, 33, 64])
def test_padding_leaves_half_the_size_rounded_up(size: int) -> None:
    out = F.conv2d(padded(torch.zeros(1, 1, size, size), 2), torch.ones(1, 1, 3, 3), stride=2)
    assert out.shape[-1] == -(-size // 2)


def stirred(block: nn.Module) -> nn.Module:
    """Batch norms that do something, so that before and after them differ."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -1, 1)
    return block.eval()


def convolved(x: Tensor, conv: nn.Module, stride: int) -> Tensor:
    weight: Tensor = conv.get_parameter("weight")
    before = 0 if stride == 2 else 1
    return F.conv2d(F.pad(x, (before, 1, before, 1)), weight, stride=stride)


@pytest.mark.parametrize(("group", "index", "stride"), [(0, 0, 1), (1, 0, 2)])
def test_a_block_of_the_wide_network_by_hand(group: int, index: int, stride: int) -> None:
    """Asymmetric padding, Swish and the shortcut from the activated input: each changes the result."""
    torch.manual_seed(0)
    block: Any = stirred(build("deepmind-wrn", depth=16, widen_factor=2).layer[group].block[index])
    x = torch.randn(2, block.batchnorm_0.num_features, 8, 8)
    a = block.batchnorm_0(x)
    a = a * torch.sigmoid(a)
    b = block.batchnorm_1(convolved(a, block.conv_0, stride))
    inner = F.conv2d(b * torch.sigmoid(b), block.conv_1.weight, padding=1)
    with torch.no_grad():
        assert torch.allclose(block(x), inner + F.conv2d(a, block.shortcut.weight, stride=stride), atol=1e-5)


@pytest.mark.parametrize(("stage", "stride"), [(1, 2), (3, 2)])
def test_a_block_of_the_deep_network_by_hand(stage: int, stride: int) -> None:
    """Here the shortcut is a 3x3 convolution of the input as it is, padded like the other one."""
    torch.manual_seed(0)
    net = build("deepmind-preact-resnet", width=0.0625)
    block: Any = stirred(getattr(net, f"layer_{stage}")[0])
    x = torch.randn(2, block.batchnorm_0.num_features, 8, 8)
    a = block.batchnorm_0(x)
    b = block.batchnorm_1(convolved(a * torch.sigmoid(a), block.conv_2d_1, stride))
    inner = F.conv2d(b * torch.sigmoid(b), block.conv_2d_2.weight, padding=1)
    with torch.no_grad():
        assert torch.allclose(block(x), inner + convolved(x, block.shortcut, stride), atol=1e-5)


def test_shortcut_convolutions_of_the_wide_network_stand_where_the_channel_count_changes() -> None:
    """At widen factor 1 the first group keeps its 16 channels, so it has none."""
    for factor, groups in ((1, {"1", "2"}), (2, {"0", "1", "2"})):
        keys = build("deepmind-wrn", depth=16, widen_factor=factor).state_dict()
        assert {(k.split(".")[1], k.split(".")[3]) for k in keys if "shortcut" in k} == {(g, "0") for g in groups}


def test_shortcut_convolutions_of_the_deep_network_are_3x3() -> None:
    net = build("deepmind-preact-resnet", width=0.0625)
    found = {key: tuple(value.shape[2:]) for key, value in net.state_dict().items() if "shortcut" in key}
    assert found == {f"layer_{stage}.0.shortcut.weight": (3, 3) for stage in (1, 2, 3)}


@pytest.mark.parametrize("name", ["deepmind-wrn", "deepmind-preact-resnet"])
def test_the_wrong_constants_load_and_give_other_logits(name: str) -> None:
    """Why cards state them: no checkpoint holds them, so loading cannot notice."""
    torch.manual_seed(0)
    ten, hundred = (build(name, normalize=n, **SMALL[name]).eval() for n in (CIFAR10, CIFAR100))
    load_state(hundred, bare(ten).state_dict(), "net.pt")
    assert bare(ten).state_dict().keys() == ten.net.state_dict().keys()
    assert not any("normalize" in key for key in ten.state_dict()), "buffers, and not persistent ones"
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(ten(x), hundred(x), atol=1e-4)


# --- hypersphere


def test_hypersphere_logits_are_cosines_whatever_the_lengths() -> None:
    torch.manual_seed(0)
    net: Any = build("hypersphere-wrn", **SMALL["hypersphere-wrn"]).eval()
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        logits, features = net(x), net.features(x)
        lengths = features.norm(dim=1, keepdim=True) * net.fc.weight.norm(dim=1)
        assert torch.allclose(logits, features @ net.fc.weight.T / lengths, atol=1e-6)
        assert logits.abs().max() <= 1 + 1e-6
        net.fc.weight.mul_(torch.rand(10, 1) + 0.5)
        assert torch.allclose(net(x), logits, atol=1e-6)


def test_hypersphere_scale_multiplies_the_logits_only() -> None:
    torch.manual_seed(0)
    plain, scaled = (build("hypersphere-wrn", scale=s, **SMALL["hypersphere-wrn"]).eval() for s in (1, 15))
    load_state(scaled, plain.state_dict(), "net.pt")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(scaled(x), 15 * plain(x), atol=1e-5)


# --- ResNet-34 and ResNet-50


@pytest.mark.parametrize(("name", "features"), [("resnet34", 512), ("resnet50", 2048)])
def test_deeper_resnets_have_3_4_6_3_blocks(name: str, features: int) -> None:
    with torch.device("meta"):
        net = build(name)
    assert [len(getattr(net, f"layer{stage}")) for stage in range(1, 5)] == [3, 4, 6, 3]
    assert net.linear.in_features == features and net.conv1.kernel_size == (3, 3)


def test_a_bottleneck_strides_in_its_3x3_convolution() -> None:
    block = build("resnet50", width=0.0625).layer2[0]
    assert [conv.stride[0] for conv in (block.conv1, block.conv2, block.conv3)] == [1, 2, 1]
