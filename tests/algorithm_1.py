"""Q-Tuning's Algorithm 1 and equation 7 (arXiv 2509.23873), written from the paper in float64: what ours is held to.

Nothing here is taken from the package. Loops instead of arrays, and the thresholds' quantile found by bisecting a real
number. What the paper leaves open: a score that equals a threshold is in no corner; where the two dropped corners hold
too few rows for the top-up, rows in no corner follow, in the same order; of equal rows the earlier stays; at least
one row and one token are kept; a token at an end takes itself for its missing neighbour.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def share(count: int, ratio: float) -> int:
    """floor(ratio * count), at least one."""
    return max(1, math.floor(Fraction(str(ratio)) * count))


def corner(ppl: float, entropy: float, ppl_ends: np.ndarray, entropy_ends: np.ndarray) -> str | None:
    """Q1 to Q4, or none; low ends at the first of two quantiles, high begins at the second."""
    ppl_low, ppl_high = ppl_ends
    entropy_low, entropy_high = entropy_ends
    if ppl > ppl_high and entropy > entropy_high:
        return "Q1"
    if ppl > ppl_high and entropy < entropy_low:
        return "Q2"
    if ppl < ppl_low and entropy < entropy_low:
        return "Q3"
    if ppl < ppl_low and entropy > entropy_high:
        return "Q4"
    return None


def normalized(values: list[float]) -> list[float]:
    """(x - min) / (max - min), 0 where all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def keep_samples(error: list[float], entropy: list[float], ratio: float) -> dict[int, str]:
    """The kept rows of a mini-batch: Q2, Q4, or `top-up`."""
    ppl = [float(np.exp(e)) for e in error]
    target = share(len(error), ratio)

    def corners(alpha: float) -> list[str | None]:
        ends = [np.quantile(values, [alpha, 1 - alpha]) for values in (ppl, entropy)]
        return [corner(p, u, *ends) for p, u in zip(ppl, entropy, strict=True)]

    def too_many(alpha: float) -> bool:
        return sum(name in ("Q2", "Q4") for name in corners(alpha)) > target

    low, high = 0.0, 0.49
    if not too_many(high):
        low = high
    for _ in range(0 if low == high else 40):
        middle = (low + high) / 2
        low, high = (low, middle) if too_many(middle) else (middle, high)
    found = corners(low)
    kept = {index: name for index, name in enumerate(found) if name in ("Q2", "Q4")}
    difference = [abs(p - u) for p, u in zip(normalized(ppl), normalized(entropy), strict=True)]
    for pool in (("Q1", "Q3"), (None,)):
        rest = [index for index, name in enumerate(found) if name in pool]
        for index in sorted(rest, key=lambda index: -difference[index]):  # stable
            if len(kept) < target:
                kept[index] = "top-up"
    return kept


def keep_tokens(
    error: list[float], ratio: float, weight: float, percentile: float, protected: list[bool] | None = None
) -> list[bool]:
    """Which tokens of a sample in Q2 stay."""
    ppl, count = [math.exp(e) for e in error], len(error)
    limit = float(np.quantile(ppl, percentile))
    scores, detrimental = [], []
    for i, own in enumerate(ppl):
        before, after = ppl[max(0, i - 1)], ppl[min(count - 1, i + 1)]
        scores.append((1 - weight) * own + weight * (before + after))
        detrimental.append(own > limit and (before + after) / 2 > limit and not (protected and protected[i]))
    # Highest scores go, of equal ones the later.
    going = sorted((i for i in range(count) if detrimental[i]), key=lambda i: (-scores[i], -i))
    gone = set(going[: count - share(count, ratio)])
    return [i not in gone for i in range(count)]
