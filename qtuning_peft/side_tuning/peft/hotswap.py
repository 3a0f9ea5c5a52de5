"""Hot-swapping: another adapter's weights in the place of one that is loaded, under its name, without a new graph.

A server that has compiled its model, or captured its graph, goes on with the same tensors, which hold other numbers.
PEFT's own `hotswap_adapter` does this for LoRA alone.
"""

import os
from dataclasses import fields
from typing import Any

import peft
from safetensors.torch import load_file
from torch import nn

from ..network import NetworkSettings
from .config import SideTuningConfig
from .untrusted import check_file


def hotswap_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Replace the weights of a loaded side adapter by those of another with the same settings.

    Everything is checked before the first number changes.

    Args:
        model: A PEFT model, compiled or not.
        folder: The other adapter: a folder, or a name on the Hub.
        adapter_name: Of the adapter whose weights are replaced; its name stays.

    Raises:
        ValueError: when there is no such side adapter, the other has another shape or settings, or its file is damaged.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    own = getattr(inner, "peft_config", {}).get(adapter_name)
    if not isinstance(own, SideTuningConfig):
        raise ValueError(f"adapter_name is {adapter_name!r}, which is no side adapter of this model; load it first.")
    other = SideTuningConfig.from_pretrained(folder)
    assert isinstance(other, SideTuningConfig)
    for name in (*(field.name for field in fields(NetworkSettings)), "modules_to_save"):
        mine, theirs = getattr(own, name), getattr(other, name)
        if mine != theirs:
            raise ValueError(
                f"{name} is {theirs!r} in {folder}, but {mine!r} in the loaded adapter; load it under another name."
            )
    assert other.origin is not None
    file = other.origin.weights()
    check_file(file, peft.get_peft_model_state_dict(inner, adapter_name=adapter_name))
    peft.set_peft_model_state_dict(inner, load_file(file), adapter_name=adapter_name)
    for name in ("base_model_name_or_path", "revision", "tokenizer_fingerprint"):
        setattr(own, name, getattr(other, name))
