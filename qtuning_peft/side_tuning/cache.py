"""Keys and values of the side network, in the base's own cache object.

`transformers.Cache` is a list of layers, and every operation on it (beam reordering, cropping, repeating, resetting)
loops over that list. So the side blocks' layers are appended behind the base's, of the same kind as the layer of the
base block that each one follows, and generation needs no code of ours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache

_FIRST_SIDE_LAYER = "first_side_layer"
_ADAPTER = "side_adapter"


def attach_side_layers(cache: Cache, num_base_layers: int, layers: list[int], adapter: str) -> int:
    """Make sure that `cache` has a layer for every side block.

    Args:
        cache: The cache that the base is about to fill.
        num_base_layers: Number of blocks of the base.
        layers: Indices of the tapped blocks.
        adapter: Name of the active adapter.

    Returns:
        Index of the first side layer in `cache.layers`.

    Raises:
        ValueError: when the cache holds tokens that this adapter's side network has not seen.
    """
    first = getattr(cache, _FIRST_SIDE_LAYER, None)
    if first is None:
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) < num_base_layers:
                cache.layers.append(cache.layer_class_to_replicate())
        first = len(cache.layers)
        if any(layer.is_initialized and _length(layer) for layer in cache.layers):
            raise ValueError(
                "past_key_values was filled without this side network; fill it with the adapter enabled, or start anew."
            )
        # An earlier stop of the base's list (shared keys and values) is followed by its last layer.
        cache.layers.extend(_empty_like(cache.layers[min(i, first - 1)]) for i in layers)
        setattr(cache, _FIRST_SIDE_LAYER, first)
        setattr(cache, _ADAPTER, adapter)
    elif getattr(cache, _ADAPTER) != adapter:
        raise ValueError(
            f"past_key_values was filled by adapter {getattr(cache, _ADAPTER)}, and {adapter} is active; fill it with "
            "the same adapter, or start anew."
        )
    return first


def require_same_length(cache: Cache, first_side_layer: int, layers: list[int]) -> None:
    """Refuse a cache whose side layers are behind its base layers, as after a call with the adapter disabled.

    Raises:
        ValueError: when the lengths differ.
    """
    base = _length(cache.layers[min(layers[0], first_side_layer - 1)])
    side = _length(cache.layers[first_side_layer])
    if base != side:
        raise ValueError(
            f"past_key_values holds {base} tokens of the base but {side} of the side network; fill it with the adapter "
            "enabled throughout, or start anew."
        )


def _length(layer: Any) -> int:
    length = layer.get_seq_length()
    # Static layers count in a tensor; reading one on a GPU would stall generation at every token.
    return 0 if isinstance(length, torch.Tensor) and length.device.type != "cpu" else int(length)


def _empty_like(layer: Any) -> Any:
    twin = copy.copy(layer)
    for name in ("keys", "values"):
        setattr(twin, name, None)
    twin.is_initialized = False
    if isinstance(getattr(twin, "cumulative_length", None), torch.Tensor):
        twin.cumulative_length = torch.zeros_like(twin.cumulative_length)
    return twin
