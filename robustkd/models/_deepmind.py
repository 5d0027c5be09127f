"""What the two DeepMind-style networks share: Swish, and the padding of their 3x3 convolutions.

Gowal et al., "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples",
arXiv:2010.03593 (methods.md, sections 8.1 and 8.2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swish(x: Tensor) -> Tensor:
    """Swish, x times sigmoid(x), as SiLU.

    The earlier models have an autograd function of their own for it, with the same value and first derivative, which
    does not export.
    """
    return F.silu(x)


def padded(x: Tensor, stride: int) -> Tensor:
    """The input of an unpadded 3x3 convolution: one pixel all around, at stride 2 only right and below.

    That is TensorFlow's SAME padding, with which the weights were trained; symmetric padding at stride 2 samples
    other pixels, and costs accuracy without an error. An odd height or width at stride 2 is padded on both sides.
    """
    if stride == 1:
        return F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[-2:]
    return F.pad(x, (width % 2, 1, height % 2, 1))
