"""Degenerate rows: text that repeats itself looks perfect to error and uncertainty alike.

    repetition = 1 - (distinct n-grams) / (n-grams),      n = 4

A loop is easy to predict, so its error and its uncertainty go to zero: it lies among the redundant samples at best, and
shifts the thresholds for all. No model is needed to see it. (Welleck et al., 2020, call it seq-rep-n.)
"""

from __future__ import annotations

from collections.abc import Sequence

N = 4


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of `tokens` that occurred before, 0 to 1; 0 for fewer than 5 tokens."""
    grams = [tuple(tokens[start : start + N]) for start in range(len(tokens) - N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
