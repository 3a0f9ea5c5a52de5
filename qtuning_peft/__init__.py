"""Fine-tune a quantized language model for about the price of reading the data once.

Importing this package registers Quantized Side Tuning (QST, ACL 2024) with PEFT, so that `get_peft_model`,
`PeftModel.from_pretrained`, `Trainer`, TRL and `generate` accept a `SideTuningConfig` like any other. `score`, `prune`
and what they are made of choose training data on the Error-Uncertainty plane (Q-Tuning, arXiv 2509.23873).
"""

from ._register import register
from .demonstrations import add_demonstrations
from .eu_plane import EUPruner, EUPruningCallback, EUScorer, prune, score
from .side_tuning import SideTuningConfig, SideTuningModel, fit_projections
from .trainer import KeepStatesCallback, SharePrefixCallback, SideTuningTrainer

__version__ = "0.1.0"
__all__ = [
    "EUPruner",
    "EUPruningCallback",
    "EUScorer",
    "KeepStatesCallback",
    "SharePrefixCallback",
    "SideTuningConfig",
    "SideTuningModel",
    "SideTuningTrainer",
    "__version__",
    "add_demonstrations",
    "fit_projections",
    "prune",
    "score",
]

register()
