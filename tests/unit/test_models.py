"""Architectures: parameter counts, state keys and shapes of the papers' networks (methods.md, section 7)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustkd.catalog import Shelf
from robustkd.errors import ConfigError
from robustkd.models._base import Normalization, bare

COUNTS = [
    ("resnet18", {}, 10, 11_173_962),
    ("resnet18", {}, 100, 11_220_132),
    ("resnet18", {}, 200, 11_271_432),
    ("mobilenet-v2", {}, 10, 2_296_922),
    ("mobilenet-v2", {}, 100, 2_412_212),
    ("mobilenet-v2", {}, 200, 2_540_312),
    ("cifar-resnet", {"depth": 20}, 10, 269_722),
    ("cifar-resnet", {"depth": 20, "shortcut": "pad_center"}, 10, 269_722),
    ("cifar-resnet", {"depth": 56, "shortcut": "pad_center"}, 10, 853_018),
    ("wide-resnet", {"depth": 34, "widen_factor": 10}, 10, 46_160_474),
    ("wide-resnet", {"depth": 34, "widen_factor": 10, "sub_block1": True}, 10, 48_262_586),
    ("wide-resnet", {"depth": 34, "widen_factor": 10, "sub_block1": True}, 100, 48_320_276),
    ("wide-resnet", {"depth": 34, "widen_factor": 20}, 10, 184_531_674),
    ("wide-resnet", {"depth": 28, "widen_factor": 10}, 10, 36_479_194),
    ("preact-resnet", {}, 10, 11_171_146),
    ("preact-resnet", {"final_norm": True}, 100, 11_218_340),
    ("preact-resnet", {"pool": "quarter"}, 200, 11_575_816),
    ("resnet18-imagenet", {}, 10, 11_181_642),
    ("resnet18-imagenet", {}, 1000, 11_689_512),
    ("mobilenet-v2-imagenet", {}, 10, 2_236_682),
    ("mobilenet-v2-imagenet", {}, 1000, 3_504_872),
]
KEYS = {
    "resnet18": r"(conv1|bn1|linear|layer[1-4]\.[01]\.(conv[12]|bn[12]|shortcut\.[01]))\.\w+",
    "mobilenet-v2": r"(conv1|bn1|conv2|bn2|linear|layers\.(\d|1[0-6])\.(conv[123]|bn[123]|shortcut\.[01]))\.\w+",
    "cifar-resnet": r"(conv1|bn1|fc|layer[1-3]\.\d+\.(conv[12]|bn[12]))\.\w+",
    "wide-resnet": r"(conv1|bn1|fc|block[1-3]\.layer\.\d+\.(conv[12]|bn[12]|convShortcut))\.\w+",
    "preact-resnet": r"(conv1|linear|layer[1-4]\.[01]\.(conv[12]|bn[12]|shortcut\.0))\.\w+",
    "resnet34": r"(conv1|bn1|linear|layer[1-4]\.[0-5]\.(conv[12]|bn[12]|shortcut\.[01]))\.\w+",
    "resnet50": r"(conv1|bn1|linear|layer[1-4]\.[0-5]\.(conv[123]|bn[123]|shortcut\.[01]))\.\w+",
    "hypersphere-wrn": r"((conv1|bn1|block[1-3]\.layer\.\d+\.(conv[12]|bn[12]|convShortcut))\.\w+|fc\.weight)",
    "deepmind-wrn": r"(init_conv|batchnorm|logits|layer\.[0-2]\.block\.\d+\.(batchnorm_[01]|conv_[01]|shortcut))\.\w+",
    "deepmind-preact-resnet": r"(conv_2d|batchnorm|logits|layer_[0-3]\.[01]\.(batchnorm_[01]|conv_2d_[12]|shortcut))\.\w+",
    "resnet18-imagenet": r"(conv1|bn1|fc|layer[1-4]\.[01]\.(conv[12]|bn[12]|downsample\.[01]))\.\w+",
    "mobilenet-v2-imagenet": r"(features\.(\d|1[0-8])\.([01]|conv\.([0-3]|[01]\.[01]))|classifier\.1)\.\w+",
    "timm": r"[\w.]+",  # timm's own
}
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 0.0625},
    "mobilenet-v2": {"width": 0.125},
    "cifar-resnet": {},
    "wide-resnet": {"depth": 10, "widen_factor": 1},
    "preact-resnet": {"width": 0.0625},
    "resnet34": {"width": 0.0625},
    "resnet50": {"width": 0.0625},
    "hypersphere-wrn": {"depth": 10, "widen_factor": 1},
    "deepmind-wrn": {"depth": 10, "widen_factor": 1},
    "deepmind-preact-resnet": {"width": 0.0625},
    "resnet18-imagenet": {},
    "mobilenet-v2-imagenet": {"width": 0.125},
    "timm": {"model": "test_resnet"},
}
without_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm: pip install 'robustkd[timm]'")
NAMES = [pytest.param(name, marks=without_timm) if name == "timm" else name for name in Shelf("models").names()]
"""Every entry of the shelf; the one that needs an extra is skipped without it."""
every = pytest.mark.parametrize("name", NAMES)


def build(name: str, *, channels: int = 3, classes: int = 10, **knobs: Any) -> nn.Module:
    net: nn.Module = Shelf("models").get(name)(name=name, **knobs).build(channels=channels, classes=classes)
    return net


@pytest.mark.parametrize(("name", "knobs", "classes", "parameters"), COUNTS)
def test_parameter_counts(name: str, knobs: dict[str, Any], classes: int, parameters: int) -> None:
    with torch.device("meta"):  # the wide ones would take most of a gigabyte
        net = build(name, classes=classes, **knobs)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("name", "entries"), [("resnet18", 122), ("mobilenet-v2", 344)])
def test_state_entries_with_the_counters_of_batch_norm(name: str, entries: int) -> None:
    assert len(build(name).state_dict()) == entries


@every
def test_state_keys_are_those_of_public_checkpoints(name: str) -> None:
    with torch.device("meta"):
        keys = build(name, **(SMALL[name] if name == "timm" else {})).state_dict()
    assert [key for key in keys if not re.fullmatch(KEYS[name], key)] == []


def test_mobilenet_projects_the_shortcut_where_stride_one_changes_the_width() -> None:
    keys = build("mobilenet-v2").state_dict()
    assert sorted({int(k.split(".")[1]) for k in keys if ".shortcut." in k}) == [0, 1, 10, 16]
    assert len({k.split(".")[1] for k in keys if k.startswith("layers.")}) == 17


@every
@pytest.mark.parametrize("size", [28, 32, 33, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_for_every_size_and_channel_count(name: str, size: int, channels: int) -> None:
    net = build(name, channels=channels, classes=7, **SMALL[name]).eval()
    with torch.no_grad():
        assert net(torch.rand(2, channels, size, size)).shape == (2, 7)


def sizes(net: nn.Module, modules: list[nn.Module], x: Tensor) -> list[int]:
    found: list[int] = []
    for module in modules:
        module.register_forward_hook(lambda m, i, o: found.append(o.shape[-1]))
    with torch.no_grad():
        net.eval()(x)
    return found


def test_spatial_sizes_of_mobilenet_groups() -> None:
    net = build("mobilenet-v2", width=0.125)
    last_of_group = [net.layers[i] for i in (0, 2, 5, 9, 12, 15, 16)]
    assert sizes(net, last_of_group, torch.rand(1, 3, 32, 32)) == [32, 32, 16, 8, 8, 4, 4]


@pytest.mark.parametrize(("stem_stride", "expected"), [(1, [32, 16, 8, 4]), (2, [16, 8, 4, 2])])
def test_spatial_sizes_of_resnet_stages(stem_stride: int, expected: list[int]) -> None:
    net = build("resnet18", width=0.0625, stem_stride=stem_stride)
    assert sizes(net, [net.layer1, net.layer2, net.layer3, net.layer4], torch.rand(1, 3, 32, 32)) == expected


def test_spatial_sizes_of_cifar_resnet_stages() -> None:
    net = build("cifar-resnet")
    assert sizes(net, [net.layer1, net.layer2, net.layer3], torch.rand(1, 3, 32, 32)) == [32, 16, 8]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2"])
def test_activations_are_plain_relu(name: str) -> None:
    """ReLU6 would saturate: doubling the last features must go on raising the logits."""
    net = build(name, **SMALL[name]).eval()
    assert not any(isinstance(m, (nn.ReLU6, nn.Dropout, nn.MaxPool2d)) for m in net.modules())
    norm = net.bn1
    nn.init.constant_(norm.bias, 20.0)
    seen: list[Tensor] = []
    inner = net.layers[0].conv1 if name == "mobilenet-v2" else net.layer1[0].conv1
    inner.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad():
        net(torch.rand(1, 3, 32, 32))
    assert seen[0].max() > 6


@pytest.mark.parametrize(("width", "first", "last"), [(0.25, 16, 128), (0.5, 32, 256), (2.0, 128, 1024)])
def test_resnet_width_multiplies_every_channel_count(width: float, first: int, last: int) -> None:
    net = build("resnet18", width=width)
    assert (net.conv1.out_channels, net.linear.in_features) == (first, last)


def test_mobilenet_width_multiplies_every_channel_count() -> None:
    net = build("mobilenet-v2", width=0.5)
    assert (net.conv1.out_channels, net.conv2.out_channels, net.layers[16].conv3.out_channels) == (16, 640, 160)
    assert build("mobilenet-v2", width=0.001).conv1.out_channels == 1


@pytest.mark.parametrize("width", [0, -1, 9, float("inf"), float("nan"), "wide"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2"])
def test_impossible_widths_are_refused(name: str, width: Any) -> None:
    with pytest.raises(ValidationError):
        build(name, width=width)


@pytest.mark.parametrize(("shortcut", "before", "behind"), [("pad_end", 0, 16), ("pad_center", 8, 8)])
def test_padding_shortcuts(shortcut: str, before: int, behind: int) -> None:
    block = build("cifar-resnet", shortcut=shortcut).layer2[0]
    x = torch.rand(1, 16, 8, 8) + 1
    skipped = block._skip(x)
    assert skipped.shape == (1, 32, 4, 4)
    assert torch.equal(skipped[:, before : 32 - behind], x[:, :, ::2, ::2])
    assert not skipped[:, :before].any() and not skipped[:, 32 - behind :].any()


def test_convolution_shortcut_has_its_two_modules() -> None:
    keys = build("cifar-resnet", shortcut="conv_shortcut").state_dict()
    assert {k.rsplit(".", 1)[0] for k in keys if "downsample" in k} == {
        f"layer{stage}.0.downsample.{i}" for stage in (2, 3) for i in (0, 1)
    }


# --- wide and pre-activation ResNets: the forms of published teachers


def test_spatial_sizes_of_wide_resnet_groups() -> None:
    net = build("wide-resnet", **SMALL["wide-resnet"])
    assert sizes(net, [net.block1, net.block2, net.block3], torch.rand(1, 3, 32, 32)) == [32, 16, 8]


@pytest.mark.parametrize(("depth", "blocks"), [(10, 1), (22, 3), (34, 5)])
def test_wide_resnet_has_so_many_blocks_a_group(depth: int, blocks: int) -> None:
    net = build("wide-resnet", depth=depth, widen_factor=1)
    assert [len(group.layer) for group in (net.block1, net.block2, net.block3)] == [blocks] * 3


@pytest.mark.parametrize("depth", [9, 18, 35, 4, 106])
def test_wide_resnet_of_other_depths_is_refused(depth: int) -> None:
    with pytest.raises(ValidationError):
        build("wide-resnet", depth=depth)


def test_the_second_first_group_is_held_and_never_run() -> None:
    torch.manual_seed(0)
    plain = build("wide-resnet", **SMALL["wide-resnet"]).eval()
    doubled = build("wide-resnet", sub_block1=True, **SMALL["wide-resnet"]).eval()
    extra = doubled.state_dict().keys() - plain.state_dict().keys()
    assert extra == {f"sub_{key}" for key in plain.state_dict() if key.startswith("block1.")}
    doubled.load_state_dict({**doubled.state_dict(), **plain.state_dict()})
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(doubled(x), plain(x))


@pytest.mark.parametrize(("name", "shortcut"), [("wide-resnet", "convShortcut"), ("preact-resnet", "shortcut")])
def test_a_shortcut_convolution_takes_the_activated_input(name: str, shortcut: str) -> None:
    """By hand: relu(bn1(x)) goes into both branches; without a convolution x itself is added."""
    net = build(name, **SMALL[name]).eval()
    first, second = (net.block2.layer[0], None) if name == "wide-resnet" else (net.layer2[0], net.layer2[1])
    for block in filter(None, (first, second)):
        nn.init.uniform_(block.bn1.weight, 0.5, 2)
        nn.init.uniform_(block.bn1.bias, -1, 1)
        x = torch.randn(2, block.bn1.num_features, 8, 8)
        active = torch.relu(block.bn1(x))
        inner = block.conv2(torch.relu(block.bn2(block.conv1(active))))
        convolution = getattr(block, shortcut)
        with torch.no_grad():
            assert torch.equal(block(x), inner + (x if convolution is None else convolution(active)))


def test_the_final_norm_is_one_more_layer() -> None:
    small = SMALL["preact-resnet"]
    plain, normed = build("preact-resnet", **small), build("preact-resnet", final_norm=True, **small)
    extra = normed.state_dict().keys() - plain.state_dict().keys()
    assert {key.rsplit(".", 1)[0] for key in extra} == {"bn"}


def test_quarter_pooling_takes_64_pixels_and_nothing_else() -> None:
    net = build("preact-resnet", pool="quarter", **SMALL["preact-resnet"]).eval()
    assert net.linear.in_features == 4 * build("preact-resnet", **SMALL["preact-resnet"]).linear.in_features
    with torch.no_grad():
        assert net(torch.rand(2, 3, 64, 64)).shape == (2, 10)
        with pytest.raises(RuntimeError):
            net(torch.rand(2, 3, 32, 32))


# --- mean and standard deviation in front


@every
def test_normalisation_is_the_first_layer_and_no_part_of_the_state(name: str) -> None:
    torch.manual_seed(0)
    plain = build(name, **SMALL[name]).eval()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    net = build(name, normalize={"mean": mean, "std": std}, **SMALL[name]).eval()
    assert bare(net) is not net and bare(plain) is plain
    assert bare(net).state_dict().keys() == plain.state_dict().keys()
    bare(net).load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    shifted = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        assert torch.allclose(net(x), plain(shifted), atol=1e-5)
    seen: list[Tensor] = []
    bare(net).register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad():
        net(x)
    assert torch.allclose(seen[0], shifted, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"mean": [0.5, 0.5], "std": [0.1]},
        {"mean": [], "std": []},
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5], "std": [-1]},
        {"mean": [float("nan")], "std": [1]},
        {"mean": [0.5], "std": [1], "scale": 2},
    ],
)
def test_impossible_normalisation_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Normalization(**values)


@pytest.mark.parametrize(("channels", "given"), [(1, 3), (3, 1)])
def test_normalisation_for_other_channels_is_refused(channels: int, given: int) -> None:
    with pytest.raises(ConfigError, match=f"{given} values, the images have {channels} channels"):
        build("resnet18", channels=channels, normalize={"mean": [0.5] * given, "std": [0.1] * given})
