"""Attention in side blocks, an option (`side_attention`): rotary positions, masks, and the key-value cache.

    attention(x) = W_o softmax(q k^T / sqrt(n)) v,      q, k, v = W x, H heads of size n = d / r / H

(QST, ACL 2024, section 3.1.) Masks, positions and packing are the base's own, and so is the attention implementation,
except for the eager one: with narrow heads, attention maps would be most of the memory of training.

`transformers.Cache` is a list of layers, and every operation on it loops over that list. So the side blocks' layers are
appended behind the base's, of the kind of the base block that each one follows: generation needs no code of ours.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .shape import BaseShape, UnsupportedBaseError

# What attention implementations read beside the mask; the base's blocks pass them through as well.
ATTENTION_ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_FIRST_SIDE_LAYER = "first_side_layer"
_ADAPTER = "side_adapter"


@dataclass
class AttentionInputs:
    """What a side block's attention needs beside the hidden states.

    Attributes:
        attention_mask: As the base's attention implementation wants it, or `None` for plain causal attention.
        rotary: Cosine and sine from `narrow_rotary`, where the base has rotary positions.
        cache: The key-value cache, whose layer `cache_layer` belongs to this side block.
        extra: Further arguments of the attention implementation, such as the boundaries of packed sequences.
        masks: Masks of this pass as attention adds them, by their source and dtype.
    """

    attention_mask: Any = None
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None
    cache_layer: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    masks: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def additive(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """`mask` in `dtype`, minus infinity where it is boolean and false."""
        # One for all blocks: SDPA makes its own of another kind, as large as an attention map, and each block would
        # save one for backward.
        key = (id(mask), dtype)
        if key not in self.masks:
            added = mask.to(dtype)
            if mask.dtype == torch.bool:
                added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
            # With its source, whose id is its key for as long as it lives.
            self.masks[key] = (mask, added)
        return self.masks[key][1]


class SideAttention(nn.Module):
    """Causal self-attention of the side network, `width` d/r wide; keys and values have as many heads."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, shape: BaseShape, width: int, num_heads: int) -> None:
        super().__init__()
        self.config = shape.config
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = nn.Linear(width, 3 * width, bias=shape.centered_norm, dtype=torch.float32)
        self.o_proj = nn.Linear(width, width, bias=shape.centered_norm, dtype=torch.float32)

    def forward(self, hidden_states: Tensor, inputs: AttentionInputs) -> Tensor:
        """Attend; `hidden_states` and the result are (batch, length, d/r)."""
        batch, length, width = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, batch, heads, length, head size)
        query, key, value = qkv
        if inputs.rotary is not None:
            query, key = rotate(qkv[:2], *(values.to(qkv.dtype) for values in inputs.rotary))
        if inputs.cache is not None:
            key, value = inputs.cache.update(key, value, inputs.cache_layer)

        implementation = self.config._attn_implementation or "eager"
        mask = _shared_mask(inputs.attention_mask, implementation)
        if implementation not in ALL_ATTENTION_FUNCTIONS:
            implementation = "sdpa"
        if isinstance(mask, Tensor) and (mask.is_floating_point() or (implementation == "sdpa" and mask.dim() == 4)):
            mask = inputs.additive(mask, query.dtype)
        # SDPA kernels want the keys' dtype everywhere; a cache may hold another one than autocast computes in.
        key, value = key.to(query.dtype), value.to(query.dtype)
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
        output, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **inputs.extra)
        return self.o_proj(output.reshape(batch, length, width))


def _shared_mask(mask: Any, implementation: str) -> Any:
    """The base's mask, if it means the same for other heads than the base's; else an `UnsupportedBaseError`."""
    if implementation.startswith("paged"):
        raise UnsupportedBaseError(
            f"Attention implementation {implementation} keeps keys and values in pages, where the side network has "
            "none; generate without continuous batching."
        )
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1:
        raise UnsupportedBaseError(
            f"The base passes an attention mask for each of its {mask.shape[1]} heads (ALiBi), which means nothing "
            "to the side network's; leave side_attention out."
        )
    if implementation == "eager" and isinstance(mask, Tensor) and not mask.is_floating_point():
        # Elsewhere True means "attend"; in MPT's own attention it means "do not", and the side network would see ahead.
        raise UnsupportedBaseError(
            f"The base's own attention takes a mask of {mask.dtype}, whose sense is not known; leave out "
            "side_attention."
        )
    return mask


def narrow_rotary(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The base's rotary positions, (1 or batch, length, rotary size), for heads of size n, as `rotate` takes them.

    A head takes n/2 evenly spaced ones of the base's frequencies: the very frequencies theta^(-2k/n) that a model with
    such heads would have, with whatever scaling the base applies.

    Returns:
        Cosine and sine, each (1 or batch, 1, length, n or, if that is less, the rotary size).
    """
    frequencies = cos.shape[-1] // 2
    half = min(head_dim // 2, frequencies)
    index = torch.arange(half, device=cos.device) * frequencies // half
    cos, sin = cos[..., index].unsqueeze(1), sin[..., index].unsqueeze(1)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels by their position; channels beyond the pairs are left alone.

    Args:
        states: (..., batch, heads, length, head size).
        cos: (1 or batch, 1, length, turned channels), the pairs' first halves and then their second ones.
        sin: The same, negative for the first halves.
    """
    size = cos.shape[-1]
    turned = states[..., :size]
    # Few operations: in generation, starting them is what takes time.
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, dims=-1), sin)
    return turned if size == states.shape[-1] else torch.cat([turned, states[..., size:]], dim=-1)


class AttentionPass:
    """Makes the inputs of side blocks' attention from what the base gives its own blocks, in one pass."""

    def __init__(
        self, layers: Sequence[int], num_base_layers: int, head_dim: int, adapter: str, kinds: Sequence[str] | None
    ) -> None:
        self.layers, self.num_base_layers, self.head_dim, self.adapter = layers, num_base_layers, head_dim, adapter
        self.kinds = kinds  # of the base's blocks: sliding or full attention
        self.first_side_layer = 0
        self._rotary: tuple[Any, tuple[Tensor, Tensor] | None] = (None, None)  # source, and what was made of it
        self._masks: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def begin(self, arguments: dict[str, Any]) -> None:
        """Make room in the key-value cache among the first block's arguments."""
        cache = cache_in(arguments)
        if cache is not None:
            first = attach_side_layers(cache, self.num_base_layers, self.layers, self.adapter, self.kinds)
            _require_same_length(_model(cache, self.layers[0], first, self.kinds), cache.layers[first])
            self.first_side_layer = first

    def inputs(self, step: int, block: nn.Module | None, arguments: dict[str, Any], device: Any) -> AttentionInputs:
        """Inputs of side block `step` from the `arguments` of the base's `block` beside it, on `device`."""
        mask = arguments.get("attention_mask")
        inputs = AttentionInputs(
            attention_mask=mask.to(device) if isinstance(mask, Tensor) else mask,
            rotary=self._narrow_rotary(arguments.get("position_embeddings"), device),
            cache=cache_in(arguments),
            cache_layer=self.first_side_layer + step,
            masks=self._masks,
            extra={name: arguments[name] for name in ATTENTION_ARGUMENTS if arguments.get(name) is not None},
        )
        if block is not None and _sliding_window(block) is not None:
            inputs.extra["sliding_window"] = _sliding_window(block)
        return inputs

    def _narrow_rotary(self, source: Any, device: Any) -> tuple[Tensor, Tensor] | None:
        # Made once for all blocks that share the base's: autograd saves it for each of them.
        if source is not self._rotary[0]:
            if not (isinstance(source, tuple) and len(source) == 2 and source[0].dim() == 3):
                raise UnsupportedBaseError(
                    "The base passes rotary positions in a form other than (cosine, sine) of (batch, length, size); "
                    "leave side_attention out."
                )
            cos, sin = (values.to(device) for values in source)
            self._rotary = source, narrow_rotary(cos, sin, self.head_dim)
        return self._rotary[1]


def blocks_without_attention(config: Any) -> set[str]:
    """What the base's blocks are instead, by its (text) configuration; empty where all of them attend."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return set() if getattr(config, "num_attention_heads", None) else {"no attention heads"}
    return {kind for kind in kinds if not kind.endswith("attention") or kind.startswith("linear")}


def cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The key-value cache among a block's arguments."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


# Looked for in every block at every step otherwise, which generation would notice.
_WINDOWS: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _sliding_window(block: nn.Module) -> int | None:
    if block not in _WINDOWS:
        found: Any = (getattr(module, "sliding_window", None) for module in block.modules())
        _WINDOWS[block] = next(filter(None, found), None)
    return _WINDOWS[block]


def attach_side_layers(
    cache: Cache, num_base_layers: int, layers: Sequence[int], adapter: str, kinds: Sequence[str] | None = None
) -> int:
    """Give `cache`, which the base is about to fill, a layer for every side block; returns the first one's index.

    Raises:
        ValueError: when the cache holds tokens that this adapter's side network has not seen.
    """
    first = getattr(cache, _FIRST_SIDE_LAYER, None)
    if first is None:
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) < num_base_layers:
                cache.layers.append(cache.layer_class_to_replicate())
        first = len(cache.layers)
        if any(_length(layer) for layer in cache.layers):
            raise ValueError(
                "past_key_values was filled without this side network; fill it with the adapter enabled, or start anew."
            )
        cache.layers.extend(_empty_like(_model(cache, index, first, kinds)) for index in layers)
        setattr(cache, _FIRST_SIDE_LAYER, first)
        setattr(cache, _ADAPTER, adapter)
    elif getattr(cache, _ADAPTER) != adapter:
        raise ValueError(
            f"past_key_values was filled by adapter {getattr(cache, _ADAPTER)}, and {adapter} is active; fill it with "
            "the same adapter, or start anew."
        )
    return first


def _model(cache: Cache, index: int, first: int, kinds: Sequence[str] | None) -> Any:
    """The cache layer of base block `index`, or, where it shares keys and values, of the last of its kind."""
    return next(
        cache.layers[before]
        for before in range(min(index, first - 1), -1, -1)
        if hasattr(cache.layers[before], "get_seq_length") and (not kinds or kinds[before] == kinds[index])
    )


def _require_same_length(base_layer: Any, side_layer: Any) -> None:
    """Refuse a cache whose side layers are behind its base layers, as after a call with the adapter disabled."""
    base, side = _length(base_layer), _length(side_layer)
    if base != side:
        raise ValueError(
            f"past_key_values holds {base} tokens of the base but {side} of the side network; fill it with the adapter "
            "enabled throughout, or start anew."
        )


def _length(layer: Any) -> int:
    held = layer.is_initialized and hasattr(layer, "get_seq_length")
    length = layer.get_seq_length() if held else 0
    # Static layers count in a tensor; reading one on a GPU would stall generation at every token.
    return 0 if isinstance(length, torch.Tensor) and length.device.type != "cpu" else int(length)


def _empty_like(layer: Any) -> Any:
    twin = copy.copy(layer)
    twin.keys, twin.values, twin.is_initialized = None, None, False
    if isinstance(getattr(twin, "cumulative_length", None), torch.Tensor):
        twin.cumulative_length = torch.zeros_like(twin.cumulative_length)
    return twin
