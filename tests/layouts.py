"""Published checkpoints written down: every key with its shape, from the definitions (methods.md, 7 and 8), no network built.

Convolutions have no bias; a batch norm holds five entries, its step counter among them.
"""

from __future__ import annotations

Layout = dict[str, tuple[int, ...]]


def conv(name: str, inputs: int, outputs: int, kernel: int) -> Layout:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)}


def norm(name: str, channels: int) -> Layout:
    held = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{key}": (channels,) for key in held}, f"{name}.num_batches_tracked": ()}


def linear(name: str, inputs: int, classes: int, *, bias: bool = True) -> Layout:
    return {f"{name}.weight": (classes, inputs)} | ({f"{name}.bias": (classes,)} if bias else {})


def resnet18(classes: int) -> Layout:
    """The papers' student: `shortcut` is a 1x1 convolution and its norm where size or width changes."""
    out = conv("conv1", 3, 64, 3) | norm("bn1", 64)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for index in range(2):
            at = f"layer{stage}.{index}"
            out |= conv(f"{at}.conv1", inputs, width, 3) | norm(f"{at}.bn1", width)
            out |= conv(f"{at}.conv2", width, width, 3) | norm(f"{at}.bn2", width)
            if inputs != width:
                out |= conv(f"{at}.shortcut.0", inputs, width, 1) | norm(f"{at}.shortcut.1", width)
            inputs = width
    return out | linear("linear", 512, classes)


def mobilenet_v2(classes: int) -> Layout:
    """The papers' student: expansion also at t=1, a projected shortcut where a stride-1 block changes the width."""
    out = conv("conv1", 3, 32, 3) | norm("bn1", 32)
    inputs, block = 32, 0
    groups = (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    for times, width, repeats, first in groups:
        for index in range(repeats):
            at, wide = f"layers.{block}", times * inputs
            out |= conv(f"{at}.conv1", inputs, wide, 1) | norm(f"{at}.bn1", wide)
            out |= conv(f"{at}.conv2", 1, wide, 3) | norm(f"{at}.bn2", wide)
            out |= conv(f"{at}.conv3", wide, width, 1) | norm(f"{at}.bn3", width)
            if (first == 1 or index) and inputs != width:
                out |= conv(f"{at}.shortcut.0", inputs, width, 1) | norm(f"{at}.shortcut.1", width)
            inputs, block = width, block + 1
    return out | conv("conv2", 320, 1280, 1) | norm("bn2", 1280) | linear("linear", 1280, classes)


def wide_resnet(classes: int, depth: int, factor: int, *, sub_block1: bool = False, bias: bool = True) -> Layout:
    """TRADES and LTD; without `bias`, the hypersphere network."""
    out = conv("conv1", 3, 16, 3)
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    for group in (1, 2, 3):
        for name in (f"block{group}", *(("sub_block1",) if group == 1 and sub_block1 else ())):
            for index in range((depth - 4) // 6):
                at, outputs = f"{name}.layer.{index}", widths[group]
                inputs = outputs if index else widths[group - 1]
                out |= norm(f"{at}.bn1", inputs) | conv(f"{at}.conv1", inputs, outputs, 3)
                out |= norm(f"{at}.bn2", outputs) | conv(f"{at}.conv2", outputs, outputs, 3)
                if inputs != outputs:
                    out |= conv(f"{at}.convShortcut", inputs, outputs, 1)
    return out | norm("bn1", widths[3]) | linear("fc", widths[3], classes, bias=bias)


def deepmind_wrn(classes: int, depth: int, factor: int) -> Layout:
    """A 1x1 shortcut convolution exactly where the channel count changes."""
    out = conv("init_conv", 3, 16, 3)
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    for group in range(3):
        for index in range((depth - 4) // 6):
            at, outputs = f"layer.{group}.block.{index}", widths[group + 1]
            inputs = outputs if index else widths[group]
            out |= norm(f"{at}.batchnorm_0", inputs) | conv(f"{at}.conv_0", inputs, outputs, 3)
            out |= norm(f"{at}.batchnorm_1", outputs) | conv(f"{at}.conv_1", outputs, outputs, 3)
            if inputs != outputs:
                out |= conv(f"{at}.shortcut", inputs, outputs, 1)
    return out | norm("batchnorm", widths[3]) | linear("logits", widths[3], classes)


def deepmind_preact_resnet(classes: int) -> Layout:
    """3x3 shortcut convolutions."""
    out = conv("conv_2d", 3, 64, 3)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for index in range(2):
            at = f"layer_{stage}.{index}"
            out |= norm(f"{at}.batchnorm_0", inputs) | conv(f"{at}.conv_2d_1", inputs, width, 3)
            out |= norm(f"{at}.batchnorm_1", width) | conv(f"{at}.conv_2d_2", width, width, 3)
            if inputs != width:
                out |= conv(f"{at}.shortcut", inputs, width, 3)
            inputs = width
    return out | norm("batchnorm", 512) | linear("logits", 512, classes)


def preact_resnet(classes: int, *, final_norm: bool = False, features: int = 512) -> Layout:
    """1x1 shortcut convolutions without a norm; `bn` before the last layer only with `final_norm`."""
    out = conv("conv1", 3, 64, 3)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for index in range(2):
            at = f"layer{stage}.{index}"
            out |= norm(f"{at}.bn1", inputs) | conv(f"{at}.conv1", inputs, width, 3)
            out |= norm(f"{at}.bn2", width) | conv(f"{at}.conv2", width, width, 3)
            if inputs != width:
                out |= conv(f"{at}.shortcut.0", inputs, width, 1)
            inputs = width
    return out | (norm("bn", 512) if final_norm else {}) | linear("linear", features, classes)
