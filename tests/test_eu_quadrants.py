"""The corners of the plane, and the budgets that they are as wide as."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qtuning_peft.eu_plane.quadrants import find_thresholds

KEPT = ("misconception", "calibration")
CORNERS = {
    (True, True): "noise",
    (True, False): "misconception",
    (False, False): "redundant",
    (False, True): "calibration",
}


def plane(count: int, correlation: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    error = draw.normal(size=count)
    uncertainty = correlation * error + np.sqrt(1 - correlation**2) * draw.normal(size=count)
    return np.exp(error), np.exp(uncertainty)


def at_most(samples: float) -> Callable[[np.ndarray], bool]:
    return lambda corners: bool(np.isin(corners, KEPT).sum() <= samples)


@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.6, 0.95])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_corners_hold_no_more_than_the_budget_and_one_step_further_would(correlation: float, count: int) -> None:
    error, uncertainty = plane(count, correlation)
    for budget in {0, 1, count // 8, count // 4, count // 2, count}:
        thresholds = find_thresholds(error, uncertainty, at_most(budget))
        assert at_most(budget)(thresholds.corners(error, uncertainty))
        assert 0 <= thresholds.quantile <= 0.49
        if thresholds.quantile < 0.48:
            ends = [np.quantile(v, [wider := thresholds.quantile + 1e-9, 1 - wider]) for v in (error, uncertainty)]
            (low, high), (sure, unsure) = ends
            wide = ((error < low) & (uncertainty > unsure)) | ((error > high) & (uncertainty < sure))
            assert wide.sum() > budget or count == 1


@pytest.mark.parametrize("budget", [20, 500, 2000])
def test_corners_lie_where_the_paper_puts_them(budget: int) -> None:
    error, uncertainty = plane(4000, 0.2)
    thresholds = find_thresholds(error, uncertainty, at_most(budget))
    corners = thresholds.corners(error, uncertainty)
    assert thresholds.error_low < thresholds.error_high
    assert thresholds.uncertainty_low < thresholds.uncertainty_high
    for (wrong, unsure), name in CORNERS.items():
        expected = (error > thresholds.error_high) if wrong else (error < thresholds.error_low)
        expected &= (
            (uncertainty > thresholds.uncertainty_high) if unsure else (uncertainty < thresholds.uncertainty_low)
        )
        assert (corners == name).tolist() == expected.tolist()
        assert expected.any()


def test_thresholds_are_symmetric_quantiles() -> None:
    error, uncertainty = plane(1000, 0.3)
    thresholds = find_thresholds(error, uncertainty, at_most(100))
    assert 0 < thresholds.quantile < 0.49
    for values, low, high in (
        (error, thresholds.error_low, thresholds.error_high),
        (uncertainty, thresholds.uncertainty_low, thresholds.uncertainty_high),
    ):
        assert abs((values < low).mean() - thresholds.quantile) <= 0.001
        assert abs((values > high).mean() - thresholds.quantile) <= 0.001


def test_equal_rows_share_their_corner_and_the_order_does_not_matter() -> None:
    error, uncertainty = np.repeat([1.0, 2.0, 3.0, 4.0], 5), np.repeat([4.0, 1.0, 3.0, 2.0], 5)
    thresholds = find_thresholds(error, uncertainty, at_most(8))
    assert all(len({*group}) == 1 for group in thresholds.corners(error, uncertainty).reshape(4, 5))
    shuffled = np.random.default_rng(1).permutation(20)
    assert find_thresholds(error[shuffled], uncertainty[shuffled], at_most(8)) == thresholds
    alike = find_thresholds(np.ones(6), np.ones(6), at_most(6))
    assert alike.corners(np.ones(6), np.ones(6)).tolist() == ["middle"] * 6
