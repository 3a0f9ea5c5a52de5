"""Stage 1: which samples are kept, by a budget in samples or in supervised tokens.

A sample strategy is fitted on scored rows and a budget, and then says of any row what becomes of it. Equal rows share
their fate, so that it can be applied to any batch; where that makes the budget unreachable, the nearest one is met.

`@sample_strategy("name", "column", ...)` on a function that gives every row a priority adds a strategy; so does
`@SAMPLE_STRATEGIES.register("name")` on a class derived from `SampleStrategy`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd

from ..registry import Registry
from .quadrants import CALIBRATION, MISCONCEPTION


class Options(Protocol):
    """What strategies read of `EUPruner`."""

    seed: int
    neighbour_weight: float


# Beside the quadrants: what most strategies say of a row, and rows that no strategy judges.
KEPT, DROPPED, DEGENERATE, UNSCORED = "kept", "dropped", "degenerate", "unscored"
KEEP = (MISCONCEPTION, CALIBRATION, KEPT)
TRIM = (MISCONCEPTION, KEPT)


@dataclass(frozen=True)
class Budget:
    """What may be kept, and what rows cost, in samples or in supervised tokens.

    Attributes:
        target: What the kept rows should cost, at least 1.
        whole: (rows,), the cost of every row if it is kept whole.
        trimmed: (rows,), its cost if its tokens are trimmed.
    """

    target: float
    whole: np.ndarray
    trimmed: np.ndarray

    def cost(self, quadrants: np.ndarray) -> float:
        """What is kept of the rows, whose quadrants are (rows,)."""
        costs = np.where(np.isin(quadrants, TRIM), self.trimmed, self.whole)
        return float(costs[np.isin(quadrants, KEEP)].sum())


class SampleStrategy:
    """Divides rows into those that are kept and those that are not: the highest priorities, as the budget allows.

    Override `priority`, or `fit` and `__call__` to divide them otherwise.

    Args:
        options: The pruner, for its options, such as `seed`.

    Attributes:
        columns: Columns of the data that it reads; those that a score provides are computed for it.
        quadrants: What it may say of a row: quadrants of the plane, or `kept` and `dropped`.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    quadrants: ClassVar[tuple[str, ...]] = (KEPT, DROPPED)
    lowest = -math.inf

    def __init__(self, options: Options) -> None:
        self.options = options

    def priority(self, rows: pd.DataFrame) -> Any:
        """Priority of every row, (rows,)."""
        raise NotImplementedError

    def fit(self, rows: pd.DataFrame, budget: Budget) -> None:
        """Find what divides `rows` so that the kept ones cost nearest to the budget's target."""
        # Each candidate keeps one more group of equal priorities.
        candidates, group = np.unique(-np.asarray(self.priority(rows), np.float64), return_inverse=True)
        distances = np.abs(np.cumsum(np.bincount(group, weights=budget.trimmed)) - budget.target)
        nearest = int(np.flatnonzero(distances == distances.min())[-1])
        if nearest + 1 < len(candidates):
            self.lowest = -float(candidates[nearest : nearest + 2].mean())

    def __call__(self, rows: pd.DataFrame) -> np.ndarray:
        """What becomes of every row, (rows,) of names in `quadrants`."""
        return np.where(np.asarray(self.priority(rows), np.float64) >= self.lowest, KEPT, DROPPED)


Priority = Callable[[pd.DataFrame, Options], Any]
SAMPLE_STRATEGIES: Registry[type[SampleStrategy]] = Registry("strategy")


def sample_strategy(name: str, *columns: str) -> Callable[[Priority], Priority]:
    """Decorator: register a function of (rows, options) that returns priorities (rows,), the highest of which are kept.

    Of the `columns` that it reads, those that a score provides are computed for it.
    """

    def register(function: Priority) -> Priority:
        overridden = {"columns": columns, "priority": lambda self, rows: function(rows, self.options)}
        SAMPLE_STRATEGIES.add(name, type(function.__name__, (SampleStrategy,), overridden), function.__doc__)
        return function

    return register


@dataclass
class Pruned:
    """What was found.

    Attributes:
        counts: Rows by what becomes of them: by quadrant, or with another strategy by `kept` and `dropped`.
        kept_samples, target_samples: Rows kept, and the target if the budget is in samples.
        kept_tokens, target_tokens: Supervised tokens kept, and the target if the budget is in tokens.
        samples, tokens: Rows and supervised tokens there were.
        correlation: Rank correlation of error and uncertainty (Spearman); NaN if one of them is constant.
        notes: What else should be known, a sentence each.
    """

    counts: dict[str, int]
    kept_samples: int
    kept_tokens: int
    samples: int
    tokens: int
    correlation: float
    target_samples: int | None = None
    target_tokens: int | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        tokens = f"{self.kept_tokens} of {self.tokens} supervised tokens"
        return f"kept {self.kept_samples} of {self.samples} samples and {tokens} ({counts})"
