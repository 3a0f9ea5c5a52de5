"""Sample strategies: Q-Tuning's choice on the Error-Uncertainty plane, and priorities to compare with."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .quadrants import CALIBRATION, CORNERS, MIDDLE, MISCONCEPTION, Thresholds, find_thresholds
from .selection import SAMPLE_STRATEGIES, TOPPED_UP, Budget, Options, SampleStrategy, sample_strategy


@SAMPLE_STRATEGIES.register("eu_plane")
class EUPlane(SampleStrategy):
    """Misconceptions and calibration samples of the Error-Uncertainty plane, topped up (Q-Tuning).

    Algorithm 1 of arXiv 2509.23873: the two kept corners, as wide as the budget allows; while they are too small, rows
    of the dropped corners are added, whole, those first whose |normalized perplexity - normalized uncertainty| is
    largest, each normalized to 0 to 1 by the least and the greatest. Where these run out, which the paper leaves open,
    rows in no corner follow in the same order.
    """

    columns = ("error", "uncertainty")
    quadrants = (*CORNERS, TOPPED_UP, MIDDLE)
    thresholds: Thresholds

    def prepare(self, rows: pd.DataFrame, budget: Budget) -> None:
        """Find the thresholds, and what the scores are normalized by."""
        error, uncertainty = rows["error"].to_numpy(), rows["uncertainty"].to_numpy()
        self.thresholds = find_thresholds(error, uncertainty, lambda found: budget.spent(found) <= budget.target)
        self.ranges = [(float(values.min()), float(np.ptp(values)) or 1.0) for values in self._scores(rows)]

    def priority(self, rows: pd.DataFrame) -> Any:
        """Infinite in the kept corners, from 0 to 1 in the dropped ones, from -2 to -1 between them, (rows,)."""
        perplexity, uncertainty = (
            (values - least) / extent for values, (least, extent) in zip(self._scores(rows), self.ranges, strict=True)
        )
        difference, found = np.abs(perplexity - uncertainty), self._corners(rows)
        kept = np.isin(found, (MISCONCEPTION, CALIBRATION))
        return np.where(kept, np.inf, difference - 2 * (found == MIDDLE))

    def names(self, rows: pd.DataFrame, kept: np.ndarray) -> np.ndarray:
        """Corner of every row, or `topped_up`, or `middle`, (rows,)."""
        found = self._corners(rows)
        return np.where(kept & ~np.isin(found, (MISCONCEPTION, CALIBRATION)), TOPPED_UP, found)

    def _corners(self, rows: pd.DataFrame) -> np.ndarray:
        return self.thresholds.corners(rows["error"].to_numpy(), rows["uncertainty"].to_numpy())

    @staticmethod
    def _scores(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Perplexity and uncertainty, each (rows,)."""
        return perplexities(rows["error"]), rows["uncertainty"].to_numpy()


def perplexities(errors: Any) -> np.ndarray:
    """Perplexities of `errors`, nats, in float64; finite, as nothing real is less likely than e^-300."""
    return np.exp(np.minimum(np.asarray(errors, np.float64), 300.0))


def row_hash(input_ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that depends on nothing but a row's tokens and the seed, wherever the row stands."""
    data = np.asarray([seed, *input_ids], np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


@sample_strategy("random", "input_ids")
def random(rows: pd.DataFrame, options: Options) -> Any:
    """Any rows: the highest hashes of a row's tokens and the seed."""
    return np.array([row_hash(input_ids, options.seed) for input_ids in rows["input_ids"]])


@sample_strategy("longest", "supervised_tokens")
def longest(rows: pd.DataFrame, options: Options) -> Any:
    """Most supervised tokens."""
    return rows["supervised_tokens"]


@sample_strategy("shortest", "supervised_tokens")
def shortest(rows: pd.DataFrame, options: Options) -> Any:
    """Fewest supervised tokens; the baseline "Longest" of Q-Tuning, which removes the longest rows."""
    return -rows["supervised_tokens"]


@sample_strategy("highest_perplexity", "error")
def highest_perplexity(rows: pd.DataFrame, options: Options) -> Any:
    """Highest error."""
    return rows["error"]


@sample_strategy("lowest_perplexity", "error")
def lowest_perplexity(rows: pd.DataFrame, options: Options) -> Any:
    """Lowest error."""
    return -rows["error"]


@sample_strategy("entropy", "uncertainty")
def entropy(rows: pd.DataFrame, options: Options) -> Any:
    """Highest uncertainty."""
    return rows["uncertainty"]


@sample_strategy("el2n", "el2n")
def el2n(rows: pd.DataFrame, options: Options) -> Any:
    """Highest mean distance of prediction and target (Paul et al., NeurIPS 2021)."""
    return rows["el2n"]


@sample_strategy("ifd", "ifd")
def ifd(rows: pd.DataFrame, options: Options) -> Any:
    """Highest instruction-following difficulty below 1 (Li et al., NAACL 2024)."""
    # At 1 and above the prompt does not help: answer and prompt do not belong together.
    difficulty = rows["ifd"].fillna(np.inf)
    return np.where(difficulty < 1, difficulty, -difficulty)


@SAMPLE_STRATEGIES.register("infobatch")
class InfoBatch(SampleStrategy):
    """Error above the mean first, then at random (Qin et al., ICLR 2024).

    Without its rescaling of gradients, for which no trainer has a column.
    """

    columns = ("input_ids", "error")

    def prepare(self, rows: pd.DataFrame, budget: Budget) -> None:
        """Find the mean error."""
        self.mean_error = float(rows["error"].mean())

    def priority(self, rows: pd.DataFrame) -> Any:
        """1 above the mean error, and a random share of 1 for every row, (rows,)."""
        return (rows["error"].to_numpy() >= self.mean_error) + random(rows, self.options)
