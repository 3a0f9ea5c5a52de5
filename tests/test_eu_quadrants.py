"""Quadrants, thresholds and budgets."""

from __future__ import annotations

import numpy as np
import pytest

from qtuning_peft.eu_plane.quadrants import QUADRANTS, find_thresholds, thresholds_at

KEPT = ("misconception", "calibration")


def plane(count: int, correlation: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    error = draw.normal(size=count)
    uncertainty = correlation * error + np.sqrt(1 - correlation**2) * draw.normal(size=count)
    return np.exp(error), np.exp(uncertainty)


def kept_samples(quadrants: np.ndarray) -> float:
    return float(np.isin(quadrants, KEPT).sum())


@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("ratio", [0.01, 0.125, 0.25, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_any_budget_is_met_to_the_sample(correlation: float, ratio: float, count: int) -> None:
    error, uncertainty = plane(count, correlation)
    budget = max(1, round(count * ratio))
    quadrants = find_thresholds(error, uncertainty, budget, kept_samples).quadrants(error, uncertainty)
    assert kept_samples(quadrants) == budget


def test_named_quadrants_lie_where_the_paper_puts_them() -> None:
    error, uncertainty = plane(4000, 0.2)
    quadrants = find_thresholds(error, uncertainty, 2000, kept_samples).quadrants(error, uncertainty)
    high_error, high_uncertainty = error > np.median(error), uncertainty > np.median(uncertainty)
    assert (high_error & high_uncertainty)[quadrants == "noise"].all()
    assert (~high_error & ~high_uncertainty)[quadrants == "redundant"].all()
    # Far from the middle of both axes, the corners have the paper's names.
    far = (np.abs(np.argsort(np.argsort(error)) / 4000 - 0.5) > 0.4) & (
        np.abs(np.argsort(np.argsort(uncertainty)) / 4000 - 0.5) > 0.4
    )
    corners = {
        (True, True): "noise",
        (True, False): "misconception",
        (False, False): "redundant",
        (False, True): "calibration",
    }
    for (first, second), name in corners.items():
        members = far & (high_error == first) & (high_uncertainty == second)
        assert members.sum() > 5
        assert set(quadrants[members]) == {name}


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.8])
def test_samples_leave_one_at_a_time_and_never_come_back(correlation: float) -> None:
    error, uncertainty = plane(60, correlation)
    errors, uncertainties = np.sort(error), np.sort(uncertainty)
    before = np.ones(60, bool)
    trimmed = np.zeros(60, bool)
    for step in range(4 * 60 + 1):
        quadrants = thresholds_at(step, errors, uncertainties).quadrants(error, uncertainty)
        kept = np.isin(quadrants, KEPT)
        assert not (kept & ~before).any()
        assert (before & ~kept).sum() <= 1
        # What is once a misconception stays one until it leaves, so that budgets in tokens can be searched too.
        assert not (trimmed & kept & (quadrants == "calibration")).any()
        before, trimmed = kept, trimmed | (quadrants == "misconception")
    assert not before.any()


def test_equal_samples_share_their_fate() -> None:
    error, uncertainty = np.repeat([1.0, 2.0, 3.0, 4.0], 5), np.repeat([4.0, 1.0, 3.0, 2.0], 5)
    thresholds = find_thresholds(error, uncertainty, 8, kept_samples)
    quadrants = thresholds.quadrants(error, uncertainty).reshape(4, 5)
    assert all(len(set(group)) == 1 for group in quadrants)
    assert kept_samples(quadrants) in (5, 10)
    assert find_thresholds(error, uncertainty, 8, kept_samples) == thresholds


def test_the_order_of_rows_does_not_matter() -> None:
    error, uncertainty = plane(101, 0.7)
    shuffled = np.random.default_rng(1).permutation(101)
    assert find_thresholds(error, uncertainty, 40, kept_samples) == find_thresholds(
        error[shuffled], uncertainty[shuffled], 40, kept_samples
    )


def test_thresholds_are_symmetric_quantiles() -> None:
    error, uncertainty = plane(1000, 0.3)
    thresholds = find_thresholds(error, uncertainty, 800, kept_samples)
    assert 0 < thresholds.quantile < 0.5
    for values, low, high in (
        (error, thresholds.error_low, thresholds.error_high),
        (uncertainty, thresholds.uncertainty_low, thresholds.uncertainty_high),
    ):
        assert abs((values < low).mean() - thresholds.quantile) <= 0.001
        assert abs((values > high).mean() - thresholds.quantile) <= 0.001


def test_names_are_complete() -> None:
    error, uncertainty = plane(500, 0.4)
    for budget in (1, 60, 250, 440, 500):
        quadrants = find_thresholds(error, uncertainty, budget, kept_samples).quadrants(error, uncertainty)
        assert set(quadrants) <= set(QUADRANTS)
