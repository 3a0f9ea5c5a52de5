"""Several side networks from one pass of the base; see `trainer`."""

from .candidate import Candidate, candidates
from .plot import plot_sweep
from .trainer import RESULTS, SweepTrainer

__all__ = ["RESULTS", "Candidate", "SweepTrainer", "candidates", "plot_sweep"]
