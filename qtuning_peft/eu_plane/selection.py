"""Stage 1: which samples are kept, by a budget in samples or in supervised tokens.

The plane's thresholds are moved until what they keep costs the budget; any other strategy keeps its highest priorities
up to the budget. Samples that look the same share their fate, so that what was found on a whole data set can be applied
to any batch of it; where that makes the budget unreachable, the nearest one is met.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .quadrants import CALIBRATION, MISCONCEPTION, Thresholds, find_thresholds
from .strategies import SAMPLE_STRATEGIES
from .tokens import kept_counts

EU_PLANE = "eu_plane"
# Beside the quadrants: what the other strategies say of a row, and rows that no strategy is asked about.
KEPT, DROPPED, DEGENERATE, UNSCORED = "kept", "dropped", "degenerate", "unscored"
KEEP = (MISCONCEPTION, CALIBRATION, KEPT)
TRIM = (MISCONCEPTION, KEPT)

# Columns of the data: arrays (rows,), or lists of what is not a number. `protected` counts tokens that are not trimmed.
Columns = dict[str, Any]


@dataclass
class Pruned:
    """What was found.

    Attributes:
        counts: Rows by quadrant; with another strategy by `kept` and `dropped`.
        kept_samples, target_samples: Rows kept, and asked for if the budget is in samples.
        kept_tokens, target_tokens: Supervised tokens kept, and asked for if the budget is in tokens.
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
        return (
            f"kept {self.kept_samples} of {self.samples} samples and {self.kept_tokens} of {self.tokens} supervised "
            f"tokens ({counts})"
        )


@dataclass(frozen=True)
class Budget:
    """How much is kept: one of a share of the samples, their number, and a number of supervised tokens.

    Attributes:
        sample_ratio, num_samples, num_tokens: The budget; two of them are `None`.
        token_ratio: Share of the supervised tokens that stay in samples that are trimmed.
    """

    sample_ratio: float | None
    num_samples: int | None
    num_tokens: int | None
    token_ratio: float

    def samples(self, rows: int) -> int | None:
        """Samples to keep of `rows`; `None` if the budget is in tokens."""
        if self.num_tokens is not None:
            return None
        if self.num_samples is not None:
            return min(self.num_samples, rows)
        assert self.sample_ratio is not None
        return max(1, math.floor(rows * self.sample_ratio + 0.5))

    def of_groups(self, sizes: dict[Any, int], rows: int) -> dict[Any, float]:
        """The budget of every group of samples, in proportion to its size.

        Args:
            sizes: Samples that can be chosen, by group.
            rows: All samples: those without a score count, or the budget would depend on them.
        """
        total = self.samples(rows)
        if total is None:
            assert self.num_tokens is not None
            return dict.fromkeys(sizes, float(self.num_tokens))
        choosable = sum(sizes.values())
        total = min(total, choosable)
        shares = {group: total * size / choosable for group, size in sizes.items()}
        targets = {group: math.floor(share) for group, share in shares.items()}
        # Largest remainders first, so that the total is met.
        rest = total - sum(targets.values())
        for group in sorted(shares, key=lambda group: targets[group] - shares[group])[:rest]:
            targets[group] += 1
        return {group: float(target) for group, target in targets.items()}

    def cost(self, quadrants: np.ndarray, rows: Columns) -> float:
        """What is kept of `rows`, whose quadrants are (rows,), in the budget's unit."""
        if self.num_tokens is None:
            return float(np.isin(quadrants, KEEP).sum())
        return float(self.kept_tokens(quadrants, rows))

    def trimmed(self, rows: Columns) -> np.ndarray:
        """Supervised tokens that stay of every row if it is trimmed, (rows,)."""
        counts = kept_counts(rows["supervised_tokens"], self.token_ratio)
        return np.maximum(counts, rows["protected"]) if "protected" in rows else counts

    def kept_tokens(self, quadrants: np.ndarray, rows: Columns) -> int:
        """Supervised tokens that stay of `rows`, whose quadrants are (rows,)."""
        tokens = np.where(np.isin(quadrants, TRIM), self.trimmed(rows), rows["supervised_tokens"])
        return int(tokens[np.isin(quadrants, KEEP)].sum())


@dataclass(frozen=True)
class Cut:
    """Where samples are divided: the thresholds of the plane, or the lowest priority that is kept.

    Attributes:
        strategy: The strategy.
        seed: For one that draws.
        thresholds: Of the plane.
        priority: Of another strategy.
        mean_error: Of the samples it was found on, nats.
    """

    strategy: str
    seed: int
    thresholds: Thresholds | None = None
    priority: float = -math.inf
    mean_error: float = 0.0

    def quadrants(self, rows: Columns) -> np.ndarray:
        """Quadrant of every row, (rows,); `kept` or `dropped` with another strategy than the plane."""
        if self.thresholds is not None:
            return self.thresholds.quadrants(rows["error"], rows["uncertainty"])
        priority = SAMPLE_STRATEGIES[self.strategy][1](rows, self.seed, self.mean_error)
        return np.where(priority >= self.priority, KEPT, DROPPED)


def find_cut(rows: Columns, strategy: str, budget: Budget, target: float, seed: int) -> Cut:
    """The cut of `rows` whose kept samples cost nearest to `target`; something is kept unless that is 0."""
    mean_error = float(rows["error"].mean())
    if strategy == EU_PLANE:
        thresholds = find_thresholds(rows["error"], rows["uncertainty"], target, lambda q: budget.cost(q, rows))
        return Cut(strategy, seed, thresholds, mean_error=mean_error)
    priority = SAMPLE_STRATEGIES[strategy][1](rows, seed, mean_error)
    if target == 0:
        return Cut(strategy, seed, priority=math.inf, mean_error=mean_error)
    # Each candidate keeps one more group of equal priorities.
    candidates, group = np.unique(-priority, return_inverse=True)
    worth = np.ones(len(priority)) if budget.num_tokens is None else budget.trimmed(rows)
    distances = np.abs(np.cumsum(np.bincount(group, weights=worth)) - target)
    nearest = int(np.flatnonzero(distances == distances.min())[-1])
    lowest = -math.inf if nearest + 1 == len(candidates) else -float(candidates[nearest : nearest + 2].mean())
    return Cut(strategy, seed, priority=lowest, mean_error=mean_error)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two arrays (samples,), equal values sharing their mean rank; NaN if one is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return math.nan
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])
