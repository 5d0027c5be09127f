"""Intervals and paired tests for accuracies on the same images. Needs no torch.

References: Wilson 1927; Clopper and Pearson 1934; McNemar 1947 (exact form); Tango, "Equivalence test and
confidence interval for the difference in proportions for the paired-sample design", Statist. Med. 17, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import bdtr, betaincinv, ndtr, ndtri  # scipy.stats takes three times as long to load


def wilson(k: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Two-sided Wilson score interval of a proportion, as fractions; (0, 1) where n is 0.

    Raises:
        ValueError: k is not in 0..n.
    """
    _check_count(k, n)
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri(1 - alpha / 2))
    share, weight = k / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / weight
    half = z / weight * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # k = 0 and k = n touch their ends exactly; rounding must not move them inside
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


def clopper_pearson(k: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Two-sided exact interval of a proportion: its coverage is never below 1 - alpha.

    Raises:
        ValueError: k is not in 0..n.
    """
    _check_count(k, n)
    if n == 0:
        return 0.0, 1.0
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, alpha / 2))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - alpha / 2))
    return low, high


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar test. It asks "is there a difference", not "is it small".

    Raises:
        ValueError: a count is negative.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts are not negative: b={b}, c={c}")
    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def tango(b: int, c: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """One-sided score limits (L, U) of the paired drop (b - c) / n, each at level 1 - alpha.

    Args:
        b: images on which the source is right and the engine wrong.
        c: the reverse.
        n: all images.
        alpha: error of each limit.

    Raises:
        ValueError: the counts are negative, do not fit into n, or n is 0.
    """
    if min(b, c) < 0 or b + c > n or n < 1:
        raise ValueError(f"not a paired table: b={b}, c={c}, n={n}")
    z = float(ndtri(1 - alpha))
    return _limit(b, c, n, z), _limit(b, c, n, -z)


def _limit(b: int, c: int, n: int, z: float) -> float:
    """The D at which the score statistic equals z; it falls as D rises."""
    edge = 1 - 1e-12

    def gap(drop: float) -> float:
        return _score(b, c, n, drop) - z

    if gap(edge) >= 0:
        return 1.0
    if gap(-edge) <= 0:
        return -1.0
    from scipy.optimize import brentq  # as slow to load, and an audit without a source needs none of it

    return float(brentq(gap, -edge, edge, xtol=1e-12))


def _score(b: int, c: int, n: int, drop: float) -> float:
    """Tango's statistic; q is the restricted maximum-likelihood estimate of P(engine right, source wrong)."""
    a_, b_, c_ = 2 * n, -b - c + (2 * n - b + c) * drop, -c * drop * (1 - drop)
    q = (math.sqrt(max(0.0, b_ * b_ - 4 * a_ * c_)) - b_) / (2 * a_)
    variance = n * (2 * q + drop * (1 - drop))
    difference = b - c - n * drop
    if variance <= 0:  # only where the hypothesis leaves no room for the other cell
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def drop_p(b: int, c: int, n: int, margin: float) -> float:
    """One-sided p value of "the paired drop is less than the margin": Tango's score, and the exact binomial where c is 0.

    At most alpha exactly where the upper limit of level 1 - alpha is at most the margin.

    Raises:
        ValueError: the counts do not fit into n, or the margin is not inside (0, 1).
    """
    if min(b, c) < 0 or b + c > n or n < 1 or not 0 < margin < 1:
        raise ValueError(f"not a paired table and a margin: b={b}, c={c}, n={n}, margin={margin}")
    score = float(ndtr(_score(b, c, n, margin)))
    return score if c else max(score, float(bdtr(b, n, margin)))


def floor_p(k: int, n: int, floor: float) -> float:
    """One-sided p value of "the share is above the floor", the score test behind Wilson's interval.

    Raises:
        ValueError: k is not in 0..n.
    """
    _check_count(k, n)
    if n == 0 or not 0 < floor < 1:
        return 1.0 if n == 0 or floor >= 1 else 0.0
    return float(ndtr((floor - k / n) / math.sqrt(floor * (1 - floor) / n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: rejecting those of at most alpha errs at all with at most alpha.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def needed_n(
    discordance: float,
    drop: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    fail: bool = False,
) -> int | None:
    """Images with which a paired audit would probably decide.

    Args:
        discordance: expected share of images on which exactly one side is right, (b + c) / n of a pilot.
        drop: assumed true drop.
        margin: allowed drop.
        alpha: one-sided error.
        power: chance to decide; 0.5 gives the n at which the limit itself is expected to meet the margin.
        fail: ask for the n that would prove a fail instead of a pass.

    Returns:
        The number, or None where no number would do: the drop lies on the margin or on its other side.
    """
    distance = drop - margin if fail else margin - drop
    if distance <= 0:
        return None
    z = float(ndtri(1 - alpha) + ndtri(power))
    spread = max(discordance, abs(drop)) - drop * drop
    found = max(1, math.ceil(z * z * spread / (distance * distance) - 1e-9))
    return found if fail else max(found, _without_discordance(margin, alpha))


def _without_discordance(margin: float, alpha: float) -> int:
    """The n from which U <= margin when the two sides never disagree: n D = z^2 (1 - D)."""
    z = float(ndtri(1 - alpha))
    return max(1, math.ceil(z * z * (1 - margin) / margin - 1e-9)) if 0 < margin < 1 else 1


def needed_n_single(share: float, bound: float, *, alpha: float = 0.05) -> int | None:
    """The n from which the Wilson interval around `share` no longer holds `bound`, if there is one."""
    if share == bound:
        return None
    z = float(ndtri(1 - alpha / 2))
    return max(1, math.ceil(z * z * bound * (1 - bound) / (share - bound) ** 2 - 1e-9))


def _check_count(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"not a count out of n: k={k}, n={n}")
