"""Fingerprint of a scoring run: the same for the same weights, tokenizer and settings, in any process.

Finished parts are found again by it, so a change that it leaves out would find scores of something else.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..head import causal_model

# Changes when scores change for the same input.
VERSION = 2


def fingerprint(settings: Sequence[Any], tokenizer: Any, models: Sequence[nn.Module]) -> str:
    """Fingerprint of scoring under `models` with `settings`."""
    digest = xxhash.xxh3_128()
    digest.update(stable([VERSION, *settings]))
    if tokenizer is not None:
        digest.update(stable([tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]))
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for model in models:
        add_model(digest, model)
    return digest.hexdigest()


def add_model(digest: xxhash.xxh3_128, model: nn.Module) -> None:
    """Add a model's configuration, its adapters' state and its weights, those of disabled adapters excepted."""
    digest.update(stable(causal_model(model).config.to_dict()))
    unused: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            digest.update(stable([module.active_adapters, module.disable_adapters]))
            if module.disable_adapters:
                unused += [f"{path}.{name}." for name in module.adapter_layer_names + module.other_param_names]
    for name, parameter in model.named_parameters():
        # Quantized weights are left out: some kernels repack them in place, and they do not change in training.
        if parameter.is_floating_point() and not parameter.is_meta and not name.startswith(tuple(unused)):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, config in sorted(getattr(model, "peft_config", {}).items()):
        digest.update(stable([name, config.to_dict()]))


def stable(value: Any) -> bytes:
    """`value` as bytes that do not depend on the process, as the order of a set does."""
    return json.dumps(value, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)).encode()
