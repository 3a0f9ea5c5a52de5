"""What the networks of a sweep learned, drawn: every one's loss against steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .candidate import Candidate


def plot_sweep(history: Sequence[Mapping[str, Any]], sweep: Sequence[Candidate], path: Path) -> None:
    """Draw every network's loss, in training and evaluation, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for index, candidate in enumerate(sweep):
        for key, style in (("loss_", {"alpha": 0.4}), ("eval_loss_", {"marker": "o"})):
            points = [(e["step"], e[key + candidate.name]) for e in history if key + candidate.name in e]
            if points:
                label = candidate.label() if key == "eval_loss_" else None
                axes.plot(*zip(*points, strict=True), color=f"C{index % 10}", label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token); dots: validation")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
