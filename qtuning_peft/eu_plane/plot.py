"""A picture of the Error-Uncertainty plane: the samples, their quadrants, the thresholds between them.

Few samples are drawn as points, many as a density, so that a million rows take seconds and stay readable.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import replacing
from .pruner import EUPruner
from .quadrants import CALIBRATION, MISCONCEPTION, NOISE, REDUNDANT, Thresholds
from .selection import DEGENERATE, DROPPED, KEPT, SAMPLE_STRATEGIES, UNSCORED, rank_correlation
from .strategies import EUPlane

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which colour-blind readers tell apart; what is dropped as known is grey.
COLOURS = {
    NOISE: "#d55e00",
    MISCONCEPTION: "#0072b2",
    REDUNDANT: "#8c8c8c",
    CALIBRATION: "#009e73",
    KEPT: "#0072b2",
    DROPPED: "#8c8c8c",
    DEGENERATE: "#cc79a7",
    UNSCORED: "#bdbdbd",
}
INK = "#24292f"
FORMATS = (".png", ".svg", ".pdf")
MOST_POINTS = 20_000


def plot_plane(
    scored: Dataset | Mapping[str, Sequence[Any]],
    pruner: EUPruner | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw error over uncertainty, with the distribution of both.

    Args:
        scored: Data with the columns that `EUScorer` adds. Rows without a score are left out.
        pruner: Colours the samples by quadrant and gives the thresholds.
        path: Also save the picture here, as `.png`, `.svg` or `.pdf`; a file of that name is replaced once it is whole.
        title: Stands above the picture.

    Returns:
        The figure of matplotlib.

    Raises:
        ImportError: without matplotlib.
        ValueError: when the data or the path cannot be used.
    """
    file = None if path is None else Path(path)
    if file is not None and file.suffix.lower() not in FORMATS:
        raise ValueError(f"path is {file}; choose a name that ends in {', '.join(FORMATS)}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("Drawing the plane needs matplotlib: pip install 'qtuning-peft[plot]'.") from error

    for name in ("error", "uncertainty"):
        if name not in (getattr(scored, "column_names", None) or scored):
            raise ValueError(f"The data has no column {name}; score the data with EUScorer first.")
    y, x = (np.array(scored[name][:], np.float64) for name in ("error", "uncertainty"))
    shown = np.isfinite(x) & np.isfinite(y)
    if not shown.any():
        raise ValueError(f"None of the {len(shown)} rows has a score; there is nothing to draw.")
    x, y = x[shown], y[shown]
    groups: dict[str, np.ndarray] = {MISCONCEPTION: np.ones(len(x), bool)}
    if pruner is not None:
        quadrants = pruner.quadrants(scored)[shown]
        expected = SAMPLE_STRATEGIES[pruner.strategy].quadrants
        groups = {name: quadrants == name for name in COLOURS if name in expected or name in quadrants}

    figure = Figure(figsize=(7.2, 6.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.02, hspace=0.02)
    plane = figure.add_subplot(grid[1, 0])
    above, right = figure.add_subplot(grid[0, 0], sharex=plane), figure.add_subplot(grid[1, 1], sharey=plane)
    view = (_view(x), _view(y))
    plane.set(
        xlim=view[0], ylim=view[1], xlabel="uncertainty (mean entropy, nats per token)",
        ylabel="error (mean negative log-likelihood, nats per token)",
    )  # fmt: skip
    (_points if len(x) <= MOST_POINTS else _density)(plane, x, y, groups, view)

    bars: dict[str, Any] = {"stacked": True, "color": [COLOURS[name] for name in groups], "linewidth": 0}
    bars["bins"] = int(np.clip(2 * np.sqrt(len(x)), 12, 60))
    above.hist([x[members] for members in groups.values()], range=view[0], **bars)
    right.hist([y[members] for members in groups.values()], range=view[1], orientation="horizontal", **bars)
    above.axis("off")
    right.axis("off")
    plane.spines[["top", "right"]].set_visible(False)
    plane.spines[["left", "bottom"]].set_color(INK)
    plane.tick_params(colors=INK)
    for label in (plane.xaxis.label, plane.yaxis.label):
        label.set_color(INK)

    if isinstance(fitted := pruner and not pruner.per_batch and pruner.fitted, EUPlane):
        _lines(plane, fitted.thresholds)
    if pruner is not None:
        handles = [
            Line2D([], [], marker="o", linestyle="", color=COLOURS[name], label=f"{name}: {int(members.sum()):,}")
            for name, members in groups.items()
        ]
        columns = 6 if sum(len(str(handle.get_label())) + 4 for handle in handles) < 90 else 3
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK,
                      handletextpad=0.1, columnspacing=1.4, fontsize=9)  # fmt: skip

    outside = int(((x < view[0][0]) | (x > view[0][1]) | (y < view[1][0]) | (y > view[1][1])).sum())
    correlation = rank_correlation(y, x)
    facts = [
        f"{len(x):,} {'sample' if len(x) == 1 else 'samples'}",
        f"rank correlation {'undefined' if np.isnan(correlation) else f'{correlation:.2f}'}",
    ]
    omissions = [
        f"{outside:,} outside of the view" if outside else "",
        f"{(~shown).sum():,} without a score left out" if not shown.all() else "",
    ]
    lines = [", ".join(facts), ", ".join(filter(None, omissions))]
    above.set_title("\n".join(filter(None, lines)), loc="left", fontsize=10, color=INK)
    if title:
        height = 26 if lines[1] else 13
        # Data sets' names may have dollar signs, which are no formulas.
        above.annotate(textwrap.fill(title, 56), (0, 1), (0, 14 + height), xycoords="axes fraction", fontsize=13,
                       textcoords="offset points", color=INK, parse_math=False)  # fmt: skip
    if file is not None:
        with replacing(file) as unfinished:
            figure.savefig(unfinished, format=file.suffix[1:].lower())
    return figure


def _view(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis that shows `values` (samples,), a few far outliers excepted."""
    low, first, third, high = np.percentile(values, (0.1, 25, 75, 99.9))
    if third > first:
        # Of fewer than a thousand samples, the percentiles leave none out.
        low, high = max(low, first - 10 * (third - first)), min(high, third + 10 * (third - first))
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 0.1
    return float(low - margin), float(high + margin)


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, groups: Mapping[str, np.ndarray], view: Any) -> None:
    colours = np.full(len(x), "", "<U7")
    for name, members in groups.items():
        colours[members] = COLOURS[name]
    size, alpha = (24, 0.85) if len(x) <= 500 else (12, 0.6) if len(x) <= 5000 else (6, 0.4)
    axes.scatter(x, y, s=size, c=colours, alpha=alpha, linewidths=0, rasterized=len(x) > 2000)


def _density(axes: Axes, x: np.ndarray, y: np.ndarray, groups: Mapping[str, np.ndarray], view: Any) -> None:
    """Cells in the mean colour of their samples, the more opaque the more there are."""
    from matplotlib.colors import to_rgb

    counts = np.stack(
        [np.histogram2d(y[members], x[members], bins=200, range=view[::-1])[0] for members in groups.values()], axis=-1
    )
    total = counts.sum(-1, keepdims=True)
    colour = counts @ np.array([to_rgb(COLOURS[name]) for name in groups]) / np.maximum(total, 1)
    opacity = np.where(total > 0, 0.2 + 0.8 * np.log1p(total) / np.log1p(max(total.max(), 1)), 0)
    image = np.minimum(np.concatenate([colour, opacity], axis=-1), 1)
    axes.imshow(image, origin="lower", extent=(*view[0], *view[1]), aspect="auto")


def _lines(axes: Axes, thresholds: Thresholds) -> None:
    """The finite thresholds: where high begins as a line, where low ends dashed; either may be the greater."""
    for side, arrows, style, end in (("low", "↓←", "--", 0), ("high", "↑→", "-", 1)):
        line: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": style, "alpha": 0.6}
        text: dict[str, Any] = {"color": INK, "fontsize": 8, "alpha": 0.8, "clip_on": True}
        # The names of both stand at opposite ends, as the lines may be close together.
        level = getattr(thresholds, f"error_{side}")
        if np.isfinite(level):
            axes.axhline(level, **line)
            text |= {"ha": ("left", "right")[end], "va": ("top", "bottom")[end]}
            axes.text(end, level, f" {side} {arrows[0]} ", transform=axes.get_yaxis_transform(), **text)
        level = getattr(thresholds, f"uncertainty_{side}")
        if np.isfinite(level):
            axes.axvline(level, **line)
            text |= {"ha": ("right", "left")[end], "va": ("bottom", "top")[end]}
            name = f" {side} {arrows[1]}" if end else f"{arrows[1]} {side} "
            axes.text(level, end, name, transform=axes.get_xaxis_transform(), **text)
