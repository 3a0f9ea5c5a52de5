"""Quantized Side Tuning (QST, ACL 2024): a small trained network beside a frozen, quantized base."""

from .config import SideTuningConfig
from .model import SideTuningModel
from .projection import fit_projections

__all__ = ["SideTuningConfig", "SideTuningModel", "fit_projections"]
