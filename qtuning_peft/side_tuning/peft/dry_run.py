"""A dry run: what the first pass would refuse is refused when the side network is attached.

A twin of the base, made from its config with fake tensors (shapes without values), runs two tokens beside a fake side
network. The base itself does not run: a pass of it may take long, and repacks some quantized weights for this device.
"""

from copy import copy, deepcopy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..follow import find_decoder
from ..network import UnsupportedBaseError
from .config import SideTuningConfig
from .following import place
from .layer import SideTuningLayer

NAME = "default"


def dry_run(base: nn.Module, config: SideTuningConfig) -> None:
    """Run two tokens through a twin of `base`; an `UnsupportedBaseError` where side tuning cannot follow it."""
    try:
        with FakeTensorMode(), torch.no_grad():
            twin = type(base)(_config_of_twin(base)).eval()
            decoder = find_decoder(twin)
            decoder.module.register_forward_pre_hook(_Once(type(base).__name__))
            layer = SideTuningLayer(twin.get_submodule(decoder.norm_path), decoder).eval()
            place(twin, decoder, layer)
            settings = copy(config)
            settings.compute_dtype = SideTuningConfig.compute_dtype
            layer.update_layer(NAME, settings)
            layer.set_adapter(NAME)
            layer.attach_to_base(decoder)
            tokens = torch.ones(1, 2, dtype=torch.int64)
            twin(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except UnsupportedBaseError:
        raise
    except Exception:
        # This twin needs values, or is made in another way than from its config alone: the first pass decides.
        return


class _Once:
    """Forward pre-hook of the decoder."""

    def __init__(self, name: str) -> None:
        self.name, self.ran = name, False

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        if self.ran:
            raise UnsupportedBaseError(
                f"{self.name} runs its blocks several times in a pass, and the mixture would be fed back into them; "
                "use a model that runs them once."
            )
        self.ran = True


def _config_of_twin(base: Any) -> Any:
    config = deepcopy(base.config)
    # Other implementations count the tokens of each expert, which are values.
    config._experts_implementation_internal = "batched_mm"
    return config
