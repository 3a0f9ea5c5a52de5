"""Quantized Side Tuning (QST, ACL 2024): a small trained network beside a frozen, quantized base.

`network` is the mathematics, `follow` how a pass of the base is followed, `peft` what PEFT sees.
"""

from .follow import fit_projections
from .peft import SideTuningConfig, SideTuningModel, hotswap_adapter

__all__ = ["SideTuningConfig", "SideTuningModel", "fit_projections", "hotswap_adapter"]
