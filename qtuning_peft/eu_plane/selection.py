"""Stage 1: which samples are kept, by a budget in samples or in supervised tokens.

A sample strategy gives every row a priority; the highest are kept. Fitted on scored rows, it then says of any row what
becomes of it: equal rows share their fate, so that it can be applied to any batch, and where that makes the budget
unreachable, the nearest one is met. A batch that is divided by itself always meets it: of equal rows, the first stay.

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
    trim_above: float


# Beside the corners of the plane: rows that it adds to the kept corners, what other strategies say of a row, and rows
# that no strategy judges.
TOPPED_UP, KEPT, DROPPED = "topped_up", "kept", "dropped"
DUPLICATE, DEGENERATE, NOISY, UNSCORED = ASIDE = "duplicate", "degenerate", "noisy", "unscored"
KEEP = (MISCONCEPTION, CALIBRATION, TOPPED_UP, KEPT)
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

    def costs(self, quadrants: np.ndarray) -> np.ndarray:
        """What each row costs if it is kept, (rows,), by its quadrant, (rows,)."""
        return np.where(np.isin(quadrants, TRIM), self.trimmed, self.whole)

    def spent(self, quadrants: np.ndarray) -> float:
        """What is kept of the rows, whose quadrants are (rows,)."""
        return float(self.costs(quadrants)[np.isin(quadrants, KEEP)].sum())


class SampleStrategy:
    """Divides rows into those that are kept and those that are not: the highest priorities, as the budget allows.

    Override `priority`; `prepare` too if it needs to see all rows first, and `names` if it says more than `kept` and
    `dropped`.

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

    def prepare(self, rows: pd.DataFrame, budget: Budget) -> None:
        """Called with all rows, before any priority is asked for."""

    def priority(self, rows: pd.DataFrame) -> Any:
        """Priority of every row, (rows,)."""
        raise NotImplementedError

    def names(self, rows: pd.DataFrame, kept: np.ndarray) -> np.ndarray:
        """What becomes of every row, (rows,) of names in `quadrants`, where `kept` (rows,), bool, are kept."""
        return np.where(kept, KEPT, DROPPED)

    def fit(self, rows: pd.DataFrame, budget: Budget) -> np.ndarray:
        """Find what divides `rows`, so that the kept ones cost nearest to the budget's target.

        Returns:
            What becomes of `rows` divided by themselves, (rows,): of equal ones, some may be kept and others not.
        """
        self.prepare(rows, budget)
        priority = np.asarray(self.priority(rows), np.float64)
        order = np.argsort(-priority, kind="stable")
        ordered, costs = priority[order], budget.costs(self.names(rows, np.ones(len(rows), bool)))
        spent = np.cumsum(costs[order])
        # Where the next row has another priority.
        together = np.append(ordered[1:] != ordered[:-1], True)
        count = _nearest(np.where(together, spent, np.inf), budget.target)
        self.lowest = float(ordered[count - 1 : count + 1].mean()) if count < len(rows) else -math.inf
        kept = np.zeros(len(rows), bool)
        kept[order[: _nearest(spent, budget.target)]] = True
        return self.names(rows, kept)

    def __call__(self, rows: pd.DataFrame) -> np.ndarray:
        """What becomes of every row, (rows,) of names in `quadrants`."""
        return self.names(rows, np.asarray(self.priority(rows), np.float64) >= self.lowest)


def _nearest(spent: np.ndarray, target: float) -> int:
    """How many rows to keep, if the first 1, 2, ... cost `spent` (rows,): of two equally near to `target`, the more."""
    distances = np.abs(spent - target)
    return int(np.flatnonzero(distances == distances.min())[-1]) + 1


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
        token_counts: The same in supervised tokens, before any is trimmed.
        kept_samples, target_samples: Rows kept, and the target if the budget is in samples.
        kept_tokens, target_tokens: Supervised tokens kept, and the target if the budget is in tokens.
        samples, tokens: Rows and supervised tokens there were.
        correlation: Rank correlation of error and uncertainty (Spearman); NaN if one of them is constant.
        notes: What else should be known, a sentence each.
    """

    counts: dict[str, int]
    token_counts: dict[str, int]
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
