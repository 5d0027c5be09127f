"""The threat model: what an adversary may do to an image. Needs no torch; tensors bring their methods.

Images are in [0, 1], so `eps` means the same in the recipe, the attack and the report.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

if TYPE_CHECKING:
    from torch import Generator, Tensor

Start = Literal["noise", "uniform", "zero"]

#: float32 rounding of the projection; a distance may exceed eps by this much
SLACK = 1e-6


def parse_pixels(value: Any) -> Any:
    """A pixel distance on the [0, 1] scale: a number, or a quotient such as "8/255".

    Raises:
        ValueError: the text is neither.
    """
    if not isinstance(value, str):
        return value
    top, slash, bottom = value.partition("/")
    try:
        number = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a pixel distance; write 8/255 or 0.0314") from None
    return number


def _pixels(value: Any) -> float:
    number = parse_pixels(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"{value!r} is not a pixel distance; write 8/255 or 0.0314")
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} must be finite and not negative")
    return float(number)


Pixels = Annotated[float, BeforeValidator(_pixels)]
"""A distance on the [0, 1] pixel scale, at least 0; YAML and the CLI may write "8/255"."""


class ThreatModel(BaseModel, frozen=True, extra="forbid"):
    """A norm ball of radius `eps` around each image, cut with the image range [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Pixels = 8 / 255

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around `x` (N, C, H, W), then of [0, 1]."""
        if self.norm == "linf":
            return x_adv.maximum(x - self.eps).minimum(x + self.eps).clamp(0, 1)
        delta = x_adv - x
        shrink = (self.eps / _norms(delta).clamp_min(1e-12)).clamp_max(1)
        return (x + delta * shrink).clamp(0, 1)

    def start(self, x: Tensor, kind: Start, rng: Generator | None = None) -> Tensor:
        """A first point for an attack (methods.md, section 1.3); neither projected nor clamped.

        `noise`: 0.001 N(0, 1) per pixel. `uniform`: uniform in the ball. `zero`: the image itself.
        """
        if kind == "zero":
            return x.clone()
        noise = x.new_empty(x.shape)
        if kind == "noise":
            return x + 0.001 * noise.normal_(generator=rng)
        if self.norm == "linf":
            return x + noise.uniform_(-self.eps, self.eps, generator=rng)
        noise.normal_(generator=rng)
        radius = per_image(x.new_empty(x.shape[0]).uniform_(0, 1, generator=rng), x)
        pixels = max(1, x[0].numel()) if x.shape[0] else 1
        return x + noise / _norms(noise).clamp_min(1e-12) * self.eps * radius ** (1 / pixels)

    def step(self, grad: Tensor) -> Tensor:
        """The direction of steepest ascent of unit length: the sign (linf) or the unit gradient (l2)."""
        if self.norm == "linf":
            return grad.sign()
        # to order 1 first: a confident network's gradients of 1e-25 have squares that underflow
        largest = per_image(grad.abs().flatten(1).amax(1), grad)
        scaled = grad / largest.masked_fill(largest == 0, 1)
        return scaled / _norms(scaled).clamp_min(1e-12)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The distance of each image from its original, (N,) in float64."""
        delta = (x_adv.double() - x.double()).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)


def _norms(delta: Tensor) -> Tensor:
    """The l2 norm of each image, shaped to broadcast over it."""
    return per_image(delta.flatten(1).norm(dim=1), delta)


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """One value (N,) for each image of x (N, ...), shaped to broadcast over them."""
    return values.view(-1, *[1] * (x.dim() - 1))
