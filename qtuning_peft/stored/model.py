"""A side-tuned model without its base."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..side_tuning import SideTuningConfig
from ..side_tuning.follow import find_decoder
from .manifest import HEAD, Manifest, checksum_of, refuse_attention, states_of


def model_from_states(folder: str | Path, config: SideTuningConfig | Mapping[str, SideTuningConfig]) -> Any:
    """A side-tuned model without its base: the head is loaded, every other weight of the base is empty.

    It has one adapter of `config`, or several, of configurations by their names; they must read what was stored. It
    runs no tokens. It learns from the batches of [`StatesCollator`], in any `Trainer` with
    `remove_unused_columns=False`; its adapter is like any other.

    Raises:
        ValueError: when a side network taps other blocks than were stored.
    """
    folder = states_of(folder)
    manifest = Manifest.read(folder)
    configs = dict(config) if isinstance(config, Mapping) else {"default": config}
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(settings)
    base.config.name_or_path = base.name_or_path = manifest.base
    shape = find_decoder(base).shape
    for each in configs.values():
        refuse_attention(each)
        if not {*each.layers(shape)} <= {*manifest.layers}:
            raise ValueError(
                f"The side network taps blocks {each.layers(shape)}, but the states are of {[*manifest.layers]}; set "
                "tap_every or layers_to_transform accordingly, or compute other states."
            )
    if checksum_of(folder / HEAD) != manifest.head:
        raise ValueError(f"{folder / HEAD} is missing or damaged; compute the states again, which keeps their parts.")
    base.get_output_embeddings().load_state_dict(load_file(folder / HEAD), assign=True)
    model: Any = None
    for name, each in configs.items():
        own = copy(each)
        own.task_type = own.task_type or "CAUSAL_LM"
        if model is None:
            model = get_peft_model(base, own, adapter_name=name)
        else:
            model.add_adapter(name, own)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty(0))
    base.get_output_embeddings().requires_grad_(False)
    return model
