"""A picture of the Error-Uncertainty plane: the samples, their quadrants, the thresholds between them.

Few samples are drawn as points, many as a density, so that a million rows take seconds and stay readable. Filled points
are kept, hollow ones are not, and diamonds have been added to meet the budget. At the edges, what was there before is
grey, and what is kept of it stands in front, in colour.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import replacing
from .pruner import EUPruner
from .quadrants import CALIBRATION, MIDDLE, MISCONCEPTION, NOISE, REDUNDANT, Thresholds
from .selection import DEGENERATE, DROPPED, DUPLICATE, KEEP, KEPT, NOISY, SAMPLE_STRATEGIES, TOPPED_UP, UNSCORED
from .strategies import EUPlane
from .table import Data, names_of, numbers, rank_correlation, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which colour-blind readers tell apart; what is dropped as known is grey.
COLOURS = {
    NOISE: "#d55e00", MISCONCEPTION: "#0072b2", REDUNDANT: "#8c8c8c", CALIBRATION: "#009e73",
    TOPPED_UP: "#e69f00", MIDDLE: "#c8ccd0", KEPT: "#0072b2", DROPPED: "#8c8c8c", DUPLICATE: "#56b4e9",
    DEGENERATE: "#cc79a7", NOISY: "#882255", UNSCORED: "#bdbdbd",
}  # fmt: skip
INK, PAPER, BEFORE = "#24292f", "#ffffff", "#e3e6e9"
STYLE: dict[Any, Any] = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK) | {
    "axes.spines.top": False, "axes.spines.right": False
}  # fmt: skip
# What is hard and uncertain need not be noise.
LABELS = {NOISE: "noise (hard and uncertain)"}
EITHER = "dropped, or topped up"
FATES = {NOISE: EITHER, MISCONCEPTION: "kept", REDUNDANT: EITHER, CALIBRATION: "kept whole"}
# Which error and which uncertainty are theirs.
CORNERS = {
    NOISE: ("high", "high"), MISCONCEPTION: ("high", "low"), REDUNDANT: ("low", "low"), CALIBRATION: ("low", "high")
}  # fmt: skip
FORMATS = (".png", ".svg", ".pdf")
MOST_POINTS = 20_000


def plot_plane(
    scored: Data,
    pruner: EUPruner | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw error over uncertainty, with the distribution of both, before and after pruning.

    Args:
        scored: Data with the columns that `EUScorer` adds. Rows without a score are left out.
        pruner: Colours the samples by quadrant and gives the thresholds.
        path: Also save the picture here, as `.png`, `.svg` or `.pdf`; a file of that name is replaced once it is whole.
        title: Title of the picture.
    """
    file = None if path is None else Path(path)
    if file is not None and file.suffix.lower() not in FORMATS:
        raise ValueError(f"path is {file}; choose a name that ends in {', '.join(FORMATS)}.")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("Drawing the plane needs matplotlib: pip install 'qtuning-peft[plot]'.") from error

    require(("error", "uncertainty"), names_of(scored))
    y, x = (numbers(scored, name) for name in ("error", "uncertainty"))
    shown = np.isfinite(x) & np.isfinite(y)
    if not shown.any():
        raise ValueError(f"None of the {len(shown)} rows has a score; there is nothing to draw.")
    x, y = x[shown], y[shown]
    # Without a pruner, all that there is.
    groups: dict[str, np.ndarray] = {KEPT: np.ones(len(x), bool)}
    if pruner is not None:
        quadrants = pruner.quadrants(scored)[shown]
        expected = SAMPLE_STRATEGIES[pruner.strategy].quadrants
        groups = {name: quadrants == name for name in COLOURS if name in expected or name in quadrants}

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 6.8), dpi=150, layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.02, hspace=0.02)
        plane = figure.add_subplot(grid[1, 0])
        above, right = figure.add_subplot(grid[0, 0], sharex=plane), figure.add_subplot(grid[1, 1], sharey=plane)
    view = (_view(x), _view(y))
    plane.set(
        xlim=view[0], ylim=view[1], xlabel="uncertainty (mean entropy, nats per token)",
        ylabel="error (mean negative log-likelihood, nats per token)",
    )  # fmt: skip
    if len(x) <= MOST_POINTS:
        size, alpha = (26, 0.9) if len(x) <= 500 else (12, 0.6) if len(x) <= 5000 else (6, 0.4)
        for name, members in groups.items():
            look: dict[str, Any] = {"alpha": alpha, "rasterized": len(x) > 2000, "label": name}
            plane.scatter(x[members], y[members], s=size, **_marker(name), **look)
    else:
        plane.imshow(_density(x, y, groups, view), origin="lower", extent=(*view[0], *view[1]), aspect="auto")

    after = {name: members for name, members in groups.items() if name in KEEP}
    bars: dict[str, Any] = {"linewidth": 0, "bins": int(np.clip(2 * np.sqrt(len(x)), 12, 60))}
    for axes, values, limits, direction in ((above, x, view[0], "vertical"), (right, y, view[1], "horizontal")):
        bars |= {"range": limits, "orientation": direction}
        axes.hist(values, color=BEFORE, **bars)
        kept = [values[members] for members in after.values()]
        axes.hist(kept, stacked=True, color=[COLOURS[name] for name in after], **bars)
        axes.axis("off")

    if pruner is not None:
        if not pruner.per_batch and isinstance(pruner.fitted, EUPlane):
            _shade(plane, pruner.fitted.thresholds, view)
            _lines(plane, pruner.fitted.thresholds)
        if NOISE in groups:
            _names(plane)
        handles: list[Any] = []
        for group, members in groups.items():
            look = _marker(group)
            look = {"marker": look["marker"], "markerfacecolor": look["facecolors"], "linestyle": "", "markersize": 6,
                    "markeredgecolor": look["edgecolors"], "markeredgewidth": look["linewidths"]}  # fmt: skip
            handles.append(Line2D([], [], label=f"{group}: {int(members.sum()):,}", **look))
        handles.append(Patch(color=BEFORE, label=f"before pruning: {len(x):,}"))
        style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "handletextpad": 0.4, "columnspacing": 1.6}
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, **style)

    outside = int(((x < view[0][0]) | (x > view[0][1]) | (y < view[1][0]) | (y > view[1][1])).sum())
    correlation = rank_correlation(y, x)
    found = "undefined" if np.isnan(correlation) else f"{correlation:.2f}"
    omitted = {"outside of the view": outside, "without a score left out": int((~shown).sum())}
    second = ", ".join(f"{count:,} {why}" for why, count in omitted.items() if count)
    total = sum(int(members.sum()) for members in after.values())
    counted = f", {total:,} kept" if pruner is not None else ""
    first = f"{len(x):,} sample{'s' * (len(x) != 1)}{counted}, rank correlation {found}"
    above.set_title(f"{first}\n{second}".rstrip(), loc="left", fontsize=10, color=INK)
    if title:
        # Data sets' names may have dollar signs, which are no formulas.
        figure.suptitle(textwrap.fill(title, 56), x=0.02, ha="left", fontsize=13, color=INK, parse_math=False)
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


def _density(x: np.ndarray, y: np.ndarray, groups: Mapping[str, np.ndarray], view: Any) -> np.ndarray:
    """Cells (200, 200, 4) in the mean colour of their samples, the more opaque the more there are."""
    from matplotlib.colors import to_rgb

    counts = np.stack(
        [np.histogram2d(y[members], x[members], bins=200, range=view[::-1])[0] for members in groups.values()], axis=-1
    )
    total = counts.sum(-1, keepdims=True)
    colour = counts @ np.array([to_rgb(COLOURS[name]) for name in groups]) / np.maximum(total, 1)
    opacity = np.where(total > 0, 0.2 + 0.8 * np.log1p(total) / np.log1p(max(total.max(), 1)), 0)
    return np.minimum(np.concatenate([colour, opacity], axis=-1), 1)


def _marker(name: str) -> dict[str, Any]:
    """How the points of a group look: filled if they are kept, hollow if not, diamonds if added to meet the budget."""
    look: dict[str, Any] = {"marker": "o", "facecolors": COLOURS[name], "edgecolors": PAPER, "linewidths": 0.5}
    if name == TOPPED_UP:
        return look | {"marker": "D", "edgecolors": INK, "linewidths": 0.7}
    return look if name in KEEP else look | {"facecolors": "none", "edgecolors": COLOURS[name], "linewidths": 1.2}


def _shade(axes: Axes, thresholds: Thresholds, view: Any) -> None:
    """The quadrants, from the thresholds to the ends of the view, in their colours."""
    from matplotlib.patches import Rectangle

    (left, right), (bottom, top) = view
    for name, (error, uncertainty) in CORNERS.items():
        up = np.clip(getattr(thresholds, f"error_{error}"), bottom, top)
        across = np.clip(getattr(thresholds, f"uncertainty_{uncertainty}"), left, right)
        width, height = (right if uncertainty == "high" else left) - across, (top if error == "high" else bottom) - up
        look: dict[str, Any] = {"color": COLOURS[name], "alpha": 0.08, "linewidth": 0, "zorder": 0, "label": name}
        axes.add_patch(Rectangle((across, up), width, height, **look))


def _names(axes: Axes) -> None:
    """Name and fate of every quadrant in its corner, between the names of the thresholds, which stand at the edges."""
    from matplotlib.patheffects import withStroke

    for name, (error, uncertainty) in CORNERS.items():
        style: dict[str, Any] = {"ha": "right" if uncertainty == "high" else "left", "color": COLOURS[name],
                                 "transform": axes.transAxes, "va": "center", "zorder": 0.5,
                                 "path_effects": [withStroke(linewidth=3, foreground=PAPER)]}  # fmt: skip
        across, up = 0.985 if uncertainty == "high" else 0.015, 0.945 if error == "high" else 0.085
        axes.text(across, up, LABELS.get(name, name), weight="bold", fontsize=10, **style)
        axes.text(across, up - 0.035, FATES[name], fontsize=9, **style)


def _lines(axes: Axes, thresholds: Thresholds) -> None:
    """The finite thresholds: where high begins as a line, where low ends dashed."""
    line: dict[str, Any] = {"color": INK, "linewidth": 0.9, "alpha": 0.6}
    text: dict[str, Any] = {"color": INK, "fontsize": 8, "alpha": 0.8, "clip_on": True}
    # The names of both stand at opposite ends, as the lines may be close together.
    for side, style, end, (above, beside), (left, right), (upper, lower) in (
        ("low", "--", 0, (" low ↓ ", "← low "), ("left", "right"), ("top", "bottom")),
        ("high", "-", 1, (" high ↑ ", " high →"), ("right", "left"), ("bottom", "top")),
    ):
        error, uncertainty = getattr(thresholds, f"error_{side}"), getattr(thresholds, f"uncertainty_{side}")
        if np.isfinite(error):
            axes.axhline(error, linestyle=style, **line)
            axes.text(end, error, above, transform=axes.get_yaxis_transform(), ha=left, va=upper, **text)
        if np.isfinite(uncertainty):
            axes.axvline(uncertainty, linestyle=style, **line)
            axes.text(uncertainty, end, beside, transform=axes.get_xaxis_transform(), ha=right, va=lower, **text)
