"""Fine-tune a quantized language model for about the price of reading the data once.

Importing this package registers Quantized Side Tuning (QST, ACL 2024) with PEFT, so that `get_peft_model`,
`PeftModel.from_pretrained`, `Trainer`, TRL and `generate` accept a `SideTuningConfig` like any other.
"""

from ._register import register
from .side_tuning import SideTuningConfig, SideTuningModel

__version__ = "0.1.0"
__all__ = ["SideTuningConfig", "SideTuningModel", "__version__"]

register()
