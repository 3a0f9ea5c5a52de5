"""Side tuning as PEFT sees it: configuration, tuner, layer, and the adapter's files."""

from .config import SideTuningConfig
from .model import SideTuningModel

__all__ = ["SideTuningConfig", "SideTuningModel"]
