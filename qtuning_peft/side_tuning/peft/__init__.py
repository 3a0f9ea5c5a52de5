"""Side tuning as PEFT sees it: configuration, tuner, layer, and the adapter's files."""

from .config import SideTuningConfig
from .hotswap import hotswap_adapter
from .model import SideTuningModel

__all__ = ["SideTuningConfig", "SideTuningModel", "hotswap_adapter"]
