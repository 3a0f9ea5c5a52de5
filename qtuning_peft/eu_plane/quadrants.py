"""The four quadrants of the Error-Uncertainty plane, and thresholds that meet a budget exactly.

    quadrant        error   uncertainty
    noise           high    high           dropped
    misconception   high    low            kept, tokens trimmed
    redundant       low     low            dropped
    calibration     low     high           kept whole              (Q-Tuning, arXiv 2509.23873)

Low and high are symmetric quantiles, a and 1 - a, on both axes. With `N` samples `a` takes steps of 1/4N: in turn, one
of the four thresholds moves past one more sample. Both squares of dropped samples only ever grow, from nothing at
a = 0 to everything at a = 1, by at most one sample a step, so bisection over the steps meets any budget to the sample.

Published code also counts (low, middle) and (middle, low) as redundant; the kept share is then not monotone in `a`, and
shares below one half can be out of reach. Here what lies in neither square is kept: whole, unless its error is high or
its uncertainty low. For small budgets `a` exceeds 1/2, and only the two far corners remain.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NOISE, MISCONCEPTION, REDUNDANT, CALIBRATION = QUADRANTS = ("noise", "misconception", "redundant", "calibration")


@dataclass(frozen=True)
class Thresholds:
    """Where low ends and high begins, in nats.

    Attributes:
        error_low, error_high: Errors below the first are low, above the second high.
        uncertainty_low, uncertainty_high: The same of uncertainties.
        error_median: Where low and high overlap (`quantile` above 1/2), a dropped sample with more error than this is
            noise, any other redundant.
        quantile: The `a` of the equations, 0 to 1.
    """

    error_low: float
    error_high: float
    uncertainty_low: float
    uncertainty_high: float
    error_median: float
    quantile: float

    def quadrants(self, error: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
        """Quadrant of every sample, (samples,) of the names in `QUADRANTS`; `error`, `uncertainty` (samples,), nats."""
        noise = (error > self.error_high) & (uncertainty > self.uncertainty_high)
        redundant = (error < self.error_low) & (uncertainty < self.uncertainty_low)
        misconception = (error > self.error_high) | (uncertainty < self.uncertainty_low)
        name = np.where(misconception, MISCONCEPTION, CALIBRATION)
        side = np.where(error > self.error_median, NOISE, REDUNDANT)
        return np.where(noise & redundant, side, np.where(noise, NOISE, np.where(redundant, REDUNDANT, name)))


def thresholds_at(step: int, errors: np.ndarray, uncertainties: np.ndarray) -> Thresholds:
    """Thresholds after `step`, 0 to 4N, of the 4N steps; `errors` and `uncertainties` (samples,), ascending."""
    count = len(errors)
    # How many samples lie beyond each threshold; the four take turns.
    error_low, uncertainty_low, error_high, uncertainty_high = ((step + 3 - turn) // 4 for turn in range(4))
    # Half-way between two samples: scores rounded on their way through a file or a format stay on their side.
    error, uncertainty = (
        np.concatenate(([-np.inf], (values[:-1] + values[1:]) / 2, [np.inf])) for values in (errors, uncertainties)
    )
    return Thresholds(
        error_low=float(error[error_low]),
        error_high=float(error[count - error_high]),
        uncertainty_low=float(uncertainty[uncertainty_low]),
        uncertainty_high=float(uncertainty[count - uncertainty_high]),
        error_median=float(np.median(errors)),
        quantile=step / (4 * count),
    )


def find_thresholds(
    error: np.ndarray, uncertainty: np.ndarray, budget: float, cost: Callable[[np.ndarray], float]
) -> Thresholds:
    """The thresholds whose kept samples cost nearest to `budget`; of two equally near, the more. Something is kept.

    Args:
        error, uncertainty: (samples,), nats, finite, at least one.
        budget: What the kept samples may cost.
        cost: From quadrants (samples,) to what is kept of them, in samples or in tokens; it must not rise as samples
            leave. Samples with equal scores leave together, which can make the exact budget unreachable.
    """
    errors, uncertainties = np.sort(error), np.sort(uncertainty)

    def kept(step: int) -> float:
        return cost(thresholds_at(step, errors, uncertainties).quadrants(error, uncertainty))

    last = 4 * len(errors)
    step = bisect_left(range(last), True, key=lambda step: kept(step) <= budget)
    if step > 0 and kept(step - 1) - budget <= budget - kept(step):
        step -= 1
    # Before the last steps, of which each empties one of the two corners, something is always kept.
    while kept(step) == 0:
        step -= 1
    return thresholds_at(step, errors, uncertainties)
