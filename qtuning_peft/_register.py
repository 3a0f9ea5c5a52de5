"""Register side tuning with PEFT: the method itself, what its files hold, and its model cards."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import register_peft_method

from .hub.card import complete_cards
from .side_tuning import SideTuningConfig, SideTuningModel
from .side_tuning.peft.files import check_config_files, refuse_pickles, remember_origins, save_the_adapter_alone
from .side_tuning.peft.peft_type import NAME, PREFIX, QST


def register() -> None:
    """Register `SideTuningConfig` and `SideTuningModel` with PEFT; calling it again changes nothing."""
    if QST in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    save_the_adapter_alone()
    refuse_pickles()
    check_config_files()
    remember_origins()
    complete_cards()
    register_peft_method(name=NAME.lower(), config_cls=SideTuningConfig, model_cls=SideTuningModel, prefix=PREFIX)
