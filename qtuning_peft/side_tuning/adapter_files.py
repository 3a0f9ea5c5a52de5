"""The tensors of a side adapter on disk: their names on every PEFT version, and checks before any is loaded.

In the model a side network's tensors are called ``<norm>.qst_side_network.<adapter name>.<tensor>``; in
``adapter_model.safetensors`` the adapter name is left out.
"""

from __future__ import annotations

import functools
from typing import Any

import peft.functional
import peft.peft_model
import peft.utils.save_and_load
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

CONTAINER = "qst_side_network"


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


def translate_on_old_peft() -> None:
    """Teach PEFT before 0.21, which has no hook for it, to take the adapter name out of our keys while saving.

    Its own code finds the name only in the last or last but one segment of a key. Nothing else changes: loading puts
    the name back where ours is, on every version.
    """
    if hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        return
    original = peft.get_peft_model_state_dict

    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: nn.Module, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        state_dict = model.state_dict() if state_dict is None else state_dict
        rest = original(model, state_dict, adapter_name, *args, **kwargs)
        side = {key: tensor for key, tensor in state_dict.items() if f".{CONTAINER}.{adapter_name}." in key}
        return {key: tensor for key, tensor in rest.items() if f".{CONTAINER}." not in key} | {
            without_adapter_name(key, adapter_name): tensor for key, tensor in side.items()
        }

    for module in (peft, peft.functional, peft.peft_model, peft.utils, peft.utils.save_and_load):
        vars(module)[original.__name__] = get_peft_model_state_dict


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more tensors" if len(keys) > 3 else "")
