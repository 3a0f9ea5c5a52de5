"""The tensors of a side adapter on disk: their names on every PEFT version, and checks before any is loaded.

In the model a side network's tensors are called ``<norm>.qst_side_network.<adapter name>.<tensor>``; in
``adapter_model.safetensors`` the adapter name is left out. PEFT from 0.21 asks the tuner for that translation
(`SideTuningModel._remove_adapter_name_from_key`). Before, its generic code takes an adapter name out only where it is
the last segment but one, so there the model's state dict shows it in that place while PEFT saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

if TYPE_CHECKING:
    from .layer import SideTuningLayer

CONTAINER = "qst_side_network"
PEFT_TRANSLATES_KEYS = hasattr(BaseTuner, "_remove_adapter_name_from_key")


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Name in a file of the tensor called `key` in the model's state dict."""
    return key.replace(f".{CONTAINER}.{adapter_name}.", f".{CONTAINER}.", 1)


def check_tensors(networks: nn.ModuleDict, state_dict: dict[str, Any], prefix: str) -> None:
    """Check everything that `state_dict` holds for side networks, before anything is copied.

    Args:
        networks: The side networks by adapter name.
        state_dict: The state dict of the whole model or of an adapter.
        prefix: What the keys of the side networks begin with.

    Raises:
        ValueError: when an adapter is incomplete, has a tensor too many, or one of another shape or not finite.
    """
    found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    for name in dict.fromkeys(key.split(".")[0] for key in found):
        if name not in networks:
            raise ValueError(
                f"The file holds {prefix}{name}, which is no adapter of this model; load it under its name."
            )
        expected = networks[name].state_dict()
        given = {key[len(name) + 1 :]: value for key, value in found.items() if key.startswith(f"{name}.")}
        check_adapter(expected, given)


def check_adapter(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    """Check the tensors of one adapter against those of the side network they are for.

    Raises:
        ValueError: as `check_tensors`.
    """
    missing = sorted(expected.keys() - given.keys())
    extra = sorted(given.keys() - expected.keys())
    if missing:
        raise ValueError(f"The adapter lacks {_some(missing)}; it was made with another configuration or is damaged.")
    if extra:
        raise ValueError(
            f"The adapter has {_some(extra)} too many; it was made with another configuration or is damaged."
        )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"The adapter's {key} has shape {tuple(tensor.shape)}, the side network needs "
                f"{tuple(expected[key].shape)}; it was made for another base or configuration."
            )
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"The adapter's {key} holds values that are not finite; the file is damaged or training diverged."
            )


def install_key_hooks(layer: SideTuningLayer) -> None:
    """On a PEFT that does not ask the tuner, show adapter names where its generic saving takes them out."""
    if not PEFT_TRANSLATES_KEYS:
        layer.register_state_dict_post_hook(_name_second_to_last)
        layer.register_load_state_dict_pre_hook(_name_behind_container)


def _name_second_to_last(layer: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    start = f"{prefix}{CONTAINER}."
    for key in [key for key in state_dict if key.startswith(start)]:
        name, *path, leaf = key[len(start) :].split(".")
        state_dict[".".join([f"{prefix}{CONTAINER}", *path, name, leaf])] = state_dict.pop(key)


def _name_behind_container(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    start = f"{prefix}{CONTAINER}."
    names = set(getattr(layer, CONTAINER))
    for key in [key for key in state_dict if key.startswith(start)]:
        *path, name, leaf = key[len(start) :].split(".")
        if path and path[0] not in names and name in names:
            state_dict[".".join([f"{prefix}{CONTAINER}", name, *path, leaf])] = state_dict.pop(key)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more tensors" if len(keys) > 3 else "")
