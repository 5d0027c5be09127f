"""The quick convolution is the convolution: exactly in float64, no worse rounded in float32, alone or in company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from robustkd.models import _winograd
from robustkd.models._fold import frozen
from robustkd.models._winograd import Winograd, suits

SIZES = st.integers(1, 13)


@pytest.fixture(autouse=True, scope="module")
def _also_where_it_is_not_worth_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_winograd, "WORK", 0)
        yield


def _conv(inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    rng = torch.Generator().manual_seed(7)
    weight = torch.randn(outputs, inputs, 3, 3, generator=rng, dtype=dtype) / (9 * inputs) ** 0.5
    return weight, torch.randn(outputs, generator=rng, dtype=dtype) if bias else None


def _images(n: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(8), dtype=dtype)


@given(n=st.integers(0, 3), inputs=st.integers(1, 5), outputs=st.integers(1, 5), height=SIZES, width=SIZES, bias=st.booleans())
@settings(max_examples=40, deadline=None)
def test_in_float64_it_is_the_convolution_and_its_gradient(n, inputs, outputs, height, width, bias):
    weight, shift = _conv(inputs, outputs, bias=bias)
    x = _images(n, inputs, height, width).requires_grad_(True)
    quick, plain = Winograd(weight, shift, images=1)(x), conv2d(x, weight, shift, padding=1)
    torch.testing.assert_close(quick, plain, rtol=1e-12, atol=1e-12)
    back = torch.randn(plain.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    for ours, theirs in zip(torch.autograd.grad(quick, x, back), torch.autograd.grad(plain, x, back), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [4, 8, 15])
def test_float32_rounds_about_as_the_plain_convolution_does(size):
    weight, bias = _conv(256, 192)
    x = _images(6, 256, size, size).requires_grad_(True)
    exact = conv2d(x, weight, bias, padding=1)
    back = torch.randn(exact.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    wanted = exact, *torch.autograd.grad(exact, x, back)
    last, errors = torch.channels_last, []
    small = x.detach().float().to(memory_format=last).requires_grad_(True)
    plain = weight.float().to(memory_format=last)
    for conv in (Winograd(weight.float(), bias.float(), images=1), lambda x: conv2d(x, plain, bias.float(), padding=1)):
        y = conv(small)
        found = y, *torch.autograd.grad(y, small, back.float().to(memory_format=last))
        errors.append([(ours - theirs).norm() / theirs.norm() for ours, theirs in zip(found, wanted, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < min(3.5 * theirs, 3e-6)


def test_an_image_is_answered_alike_in_any_company():
    conv, x = Winograd(*_conv(192, 192, dtype=torch.float32), images=1), _images(37, 192, 8, 8, torch.float32)
    together = conv(x)
    for some in (slice(0, 1), slice(5, 6), slice(36, 37), slice(3, 20)):
        assert torch.equal(conv(x[some]), together[some])
    assert torch.equal(conv(x.flip(0)), together.flip(0))


def test_a_gradient_after_inference_mode():
    conv, x = Winograd(*_conv(192, 192, dtype=torch.float32), images=1), _images(3, 192, 8, 8, torch.float32)
    with torch.inference_mode():
        first = conv(x)
    x.requires_grad_(True)
    y = conv(x)
    assert torch.equal(y, first)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_answers_outlive_the_next_call():
    conv, x = Winograd(*_conv(8, 8), images=1), _images(3, 8, 8, 8)
    first = conv(x)
    kept = first.clone()
    conv(1 - x)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(("n", "height", "width"), [(2, 8, 8), (2, 7, 8), (1, 7, 8), (1, 5, 3)])
def test_what_follows_may_work_in_place(n, height, width):
    conv, x = Winograd(*_conv(8, 8), images=1), _images(n, 8, height, width).requires_grad_(True)
    ours, theirs = conv(x).relu_(), conv2d(x, *conv._plain, padding=1).relu()
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_other_sizes_of_image_after_each_other():
    weight, bias = _conv(8, 8)
    conv = Winograd(weight, bias, images=1)
    for size in (8, 40, 5, 8):
        x = _images(2, 8, size, size)
        torch.testing.assert_close(conv(x), conv2d(x, weight, bias, padding=1), rtol=1e-12, atol=1e-12)


def test_not_finite_images_stay_their_own_trouble():
    conv, x = Winograd(*_conv(192, 192, dtype=torch.float32), images=1), _images(4, 192, 8, 8, torch.float32)
    clean = conv(x)
    x[1] = float("nan")
    found = conv(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])
    assert torch.equal(conv(x[2:3]), clean[2:3])  # what is left in the room does no harm


def test_other_precisions_take_the_plain_way():
    weight, bias = _conv(16, 16, dtype=torch.float32)
    conv, x = Winograd(weight, bias, images=1), _images(2, 16, 8, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x), conv2d(x, weight, bias, padding=1))
        assert conv(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("conv", "wanted"),
    [
        (nn.Conv2d(160, 160, 3, padding=1), True),
        (nn.Conv2d(160, 320, 3, padding=1, bias=False), True),
        (nn.Conv2d(64, 160, 3, padding=1), False),
        (nn.Conv2d(160, 160, 3), False),
        (nn.Conv2d(160, 160, 1), False),
        (nn.Conv2d(160, 160, 3, 2, 1), False),
        (nn.Conv2d(160, 160, 3, padding=2, dilation=2), False),
        (nn.Conv2d(320, 320, 3, padding=1, groups=2), False),
        (nn.Conv2d(160, 160, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(160, 160, 3, padding="same"), False),
        (nn.Conv2d(160, 160, 3, padding=1).to(torch.bfloat16), False),
    ],
)
def test_only_what_it_can_do_is_done_so(conv, wanted):
    assert suits(conv, conv.weight) is wanted


def test_little_work_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(_winograd, "WORK", 3 * 9 * 8 * 8 * 64)
    conv = Winograd(*_conv(8, 8), images=3)
    for size, quick in ((7, False), (8, True)):
        conv(_images(1, 8, size, size))
        assert (conv._ahead is not None) is quick


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.wide(x)).mean((2, 3)))


def test_a_frozen_network_has_it_wherever_it_suits(monkeypatch):
    monkeypatch.setattr(_winograd, "CHANNELS", 3)
    net, x = _Net().double().eval(), _images(4, 3, 12, 12).requires_grad_(True)
    quick = frozen(net)
    assert sum(isinstance(module, Winograd) for module in quick.modules()) == 2
    torch.testing.assert_close(quick(x), net(x), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(f(x).logsumexp(1).sum(), x)[0] for f in (quick, net))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in quick.parameters())
    assert {*dict(net.named_modules())} == {*dict(_Net().named_modules())}  # the network itself is as it was


def test_a_narrow_one_keeps_its_convolutions():
    assert not any(isinstance(module, Winograd) for module in frozen(_Net().eval()).modules())


def test_without_packed_weights_it_answers_the_same(monkeypatch):
    weight, bias = _conv(24, 16, dtype=torch.float32)
    x = _images(3, 24, 8, 8, torch.float32)
    packed = Winograd(weight, bias, images=1)(x)
    monkeypatch.setattr(_winograd, "PACKS", False)
    torch.testing.assert_close(Winograd(weight, bias, images=1)(x), packed, rtol=1e-5, atol=1e-6)
