"""Sample strategies: the thresholds of the Error-Uncertainty plane of Q-Tuning, and priorities to compare with."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .quadrants import QUADRANTS, Thresholds, find_thresholds
from .selection import SAMPLE_STRATEGIES, Budget, Options, SampleStrategy, sample_strategy


@SAMPLE_STRATEGIES.register("eu_plane")
class EUPlane(SampleStrategy):
    """Misconceptions and calibration samples of the Error-Uncertainty plane (Q-Tuning)."""

    columns = ("error", "uncertainty")
    quadrants = QUADRANTS
    thresholds: Thresholds

    def fit(self, rows: pd.DataFrame, budget: Budget) -> None:
        """Find the thresholds."""
        error, uncertainty = rows["error"].to_numpy(), rows["uncertainty"].to_numpy()
        self.thresholds = find_thresholds(error, uncertainty, budget.target, budget.cost)

    def __call__(self, rows: pd.DataFrame) -> np.ndarray:
        """Quadrant of every row, (rows,)."""
        return self.thresholds.quadrants(rows["error"].to_numpy(), rows["uncertainty"].to_numpy())


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

    def fit(self, rows: pd.DataFrame, budget: Budget) -> None:
        """Find the mean error and the lowest priority that is kept."""
        self.mean_error = float(rows["error"].mean())
        super().fit(rows, budget)

    def priority(self, rows: pd.DataFrame) -> Any:
        """1 above the mean error, and a random share of 1 for every row, (rows,)."""
        return (rows["error"].to_numpy() >= self.mean_error) + random(rows, self.options)
