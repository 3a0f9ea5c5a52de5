"""The corners of the Error-Uncertainty plane, as wide as a budget allows (Q-Tuning, arXiv 2509.23873, Algorithm 1).

    corner          perplexity      uncertainty
    noise           > Q(1 - a)      > Q(1 - a)        dropped
    misconception   > Q(1 - a)      < Q(a)            kept, tokens trimmed
    redundant       < Q(a)          < Q(a)            dropped
    calibration     < Q(a)          > Q(1 - a)        kept whole

Q are quantiles of the rows, 0 <= a <= 0.49, and a is as large as it can be with no more kept than the budget. The paper
bisects a; with N rows the corners only change where a (N - 1) passes an integer, so here those steps are bisected, and
the result is exact. The paper leaves open where a score that equals a threshold belongs: here to no corner, so that
corners never overlap, and equal rows never make them hold more than the budget.

Error and uncertainty are correlated, so that the two kept corners are usually too small even at 0.49: the top-up, the
second half of Algorithm 1, is in `strategies`.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NOISE, MISCONCEPTION, REDUNDANT, CALIBRATION = CORNERS = ("noise", "misconception", "redundant", "calibration")
MIDDLE = "middle"  # in no corner


@dataclass(frozen=True)
class Thresholds:
    """Where low ends and high begins.

    Attributes:
        error_low, error_high: Errors below the first are low, above the second high, in nats.
        uncertainty_low, uncertainty_high: The same of uncertainties, in nats.
        quantile: The `a` of the equations, 0 to 0.49.
    """

    error_low: float
    error_high: float
    uncertainty_low: float
    uncertainty_high: float
    quantile: float

    def corners(self, error: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
        """Corner of every row, or `middle`, (rows,); `error` and `uncertainty` (rows,), nats."""
        wrong, right = error > self.error_high, error < self.error_low
        unsure, sure = uncertainty > self.uncertainty_high, uncertainty < self.uncertainty_low
        return np.select([wrong & unsure, wrong & sure, right & sure, right & unsure], CORNERS, MIDDLE)


def find_thresholds(error: np.ndarray, uncertainty: np.ndarray, fits: Callable[[np.ndarray], bool]) -> Thresholds:
    """The thresholds of the widest corners that fit.

    Args:
        error, uncertainty: (rows,), nats, finite, at least one row.
        fits: From corners (rows,) to whether what is kept of them is within the budget; wider ones never fit better.
    """
    count = len(error)
    # Half-way between two rows, where scores rounded on their way through a file or a format stay on their side.
    lows, highs = zip(*(_halfway(np.sort(values)) for values in (error, uncertainty)), strict=True)

    def at(step: int) -> Thresholds:
        # `step` rows lie beyond each threshold.
        return Thresholds(
            error_low=float(lows[0][step]),
            error_high=float(highs[0][step]),
            uncertainty_low=float(lows[1][step]),
            uncertainty_high=float(highs[1][step]),
            quantile=min(0.49, step / max(1, count - 1)),
        )

    widest = -(-49 * (count - 1) // 100)
    # Corners of no rows always fit.
    step = bisect_right(range(1, widest + 1), False, key=lambda step: not fits(at(step).corners(error, uncertainty)))
    return at(step)


def _halfway(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds with 0, 1, 2, ... rows below, and those with as many above, for `ascending` values (rows,)."""
    between = (ascending[:-1] + ascending[1:]) / 2
    return np.concatenate(([-np.inf], between)), np.concatenate(([np.inf], between[::-1]))
