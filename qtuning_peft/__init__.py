"""Fine-tune a quantized language model for about the price of reading the data once.

Importing this package registers Quantized Side Tuning (QST, ACL 2024) with PEFT, so that `get_peft_model`,
`PeftModel.from_pretrained`, `Trainer`, TRL and `generate` accept a `SideTuningConfig` like any other. `score`, `prune`
and what they are made of choose training data on the Error-Uncertainty plane (Q-Tuning, arXiv 2509.23873).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._register import register
from .few_shot import add_few_shot_examples
from .registry import load_extensions
from .side_tuning import SideTuningConfig, SideTuningModel, fit_projections, hotswap_adapter

if TYPE_CHECKING:
    from .eu_plane import EUPruner, EUPruningCallback, EUScorer, prune, score
    from .stored import StatesCollator, compute_states, load_states, model_from_states, prune_states
    from .sweep import SweepTrainer, candidates
    from .trainer import HiddenStateCacheCallback, PrefixCachingCallback, SideTuningTrainer

__version__ = "0.1.0"
__all__ = [
    "EUPruner", "EUPruningCallback", "EUScorer", "HiddenStateCacheCallback", "PrefixCachingCallback",
    "SideTuningConfig", "SideTuningModel", "SideTuningTrainer", "StatesCollator", "SweepTrainer",
    "__version__", "add_few_shot_examples", "candidates", "compute_states", "fit_projections", "hotswap_adapter",
    "load_states", "model_from_states", "prune", "prune_states", "score",
]  # fmt: skip

# Imported when they are asked for: who only loads and serves adapters needs no `datasets`.
_LAZY = {
    "eu_plane": ("EUPruner", "EUPruningCallback", "EUScorer", "prune", "score"),
    "stored": ("StatesCollator", "compute_states", "load_states", "model_from_states", "prune_states"),
    "sweep": ("SweepTrainer", "candidates"),
    "trainer": ("HiddenStateCacheCallback", "PrefixCachingCallback", "SideTuningTrainer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
load_extensions()
