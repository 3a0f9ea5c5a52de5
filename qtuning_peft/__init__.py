"""Fine-tune a quantized language model for about the price of reading the data once.

Importing this package registers Quantized Side Tuning (QST, ACL 2024) with PEFT, so that `get_peft_model`,
`PeftModel.from_pretrained`, `Trainer`, TRL and `generate` accept a `SideTuningConfig` like any other. `score`, `prune`
and what they are made of choose training data on the Error-Uncertainty plane (Q-Tuning, arXiv 2509.23873).
"""

from ._register import register
from .eu_plane import EUPruner, EUPruningCallback, EUScorer, prune, score
from .side_tuning import SideTuningConfig, SideTuningModel, fit_projections
from .trainer import SideTuningTrainer

__version__ = "0.1.0"
__all__ = [
    "EUPruner",
    "EUPruningCallback",
    "EUScorer",
    "SideTuningConfig",
    "SideTuningModel",
    "SideTuningTrainer",
    "__version__",
    "fit_projections",
    "prune",
    "score",
]

register()
