"""The Error-Uncertainty plane: score a data set, see it, and keep the best of it (Q-Tuning, arXiv 2509.23873)."""

from .dataset import prune, score
from .pruner import EUPruner
from .scorer import EUScorer
from .selection import Pruned
from .training import EUPruningCallback

__all__ = ["EUPruner", "EUPruningCallback", "EUScorer", "Pruned", "prune", "score"]
