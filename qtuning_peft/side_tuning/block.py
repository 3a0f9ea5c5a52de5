"""One block of the side network: a pre-norm transformer block, r times narrower than the base's.

    y = x + attention(norm(x))        g = y + mlp(norm(y))        (QST, ACL 2024, section 3.1: "a lightweight f")

Without `side_attention` y = x: a hidden state of the base holds already what its attention has gathered.

Masks, positions and packing are those that the base gave its own block. Attention runs through the base's attention
implementation, never the eager one: with narrow heads, attention maps would be most of the memory of training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .decoder import DecoderSpec

# What attention implementations read beside the mask; the base's blocks pass them through as well.
ATTENTION_ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class BlockInputs:
    """What the base hands to each of its blocks, beside the hidden states.

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
        """`mask` in `dtype`, minus infinity where it is boolean and false.

        One for all blocks: SDPA makes its own of another kind, as large as an attention map, and each block would hold
        one for backward.
        """
        key = (id(mask), dtype)
        if key not in self.masks:
            added = mask.to(dtype)
            if mask.dtype == torch.bool:
                added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
            # With its source, whose id is its name for as long as it lives.
            self.masks[key] = (mask, added)
        return self.masks[key][1]


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input.

    Autocast would widen the input to float32 and hold that for backward, though the kernels sum in float32 anyway.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Norm `states` (..., width)."""
        if not torch.is_autocast_enabled(states.device.type):
            return super().forward(states)
        with torch.autocast(states.device.type, enabled=False):
            return F.layer_norm(
                states, self.normalized_shape, self.weight.to(states.dtype), self.bias.to(states.dtype), self.eps
            )


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input; see `LayerNorm`."""

    def forward(self, states: Tensor) -> Tensor:
        """Norm `states` (..., width)."""
        if not torch.is_autocast_enabled(states.device.type):
            return super().forward(states)
        with torch.autocast(states.device.type, enabled=False):
            return F.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)


def make_norm(spec: DecoderSpec, width: int) -> nn.Module:
    """A norm of the base's kind: LayerNorm where the base centers, RMSNorm where it does not."""
    kind = LayerNorm if spec.centered_norm else RMSNorm
    return kind(width, eps=spec.norm_eps, dtype=torch.float32)


def default_num_heads(width: int) -> int:
    """The most heads that divide `width` into even sizes of at least 64; 1 if there are none."""
    return next((heads for heads in range(width // 64, 1, -1) if width % heads == 0 and (width // heads) % 2 == 0), 1)


def narrow_rotary(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The base's rotary positions for narrower heads.

    A head of size n takes n/2 evenly spaced ones of the base's frequencies: the very frequencies theta^(-2k/n) that a
    model with such heads would have, with whatever scaling the base applies.

    Args:
        cos, sin: (1 or batch, length, rotary size), the frequencies twice.
        head_dim: Head size n.

    Returns:
        Cosine and sine as `rotate` takes them, each (1 or batch, 1, length, n or, if that is less, the rotary size).
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


class SideAttention(nn.Module):
    """Causal self-attention of the side network.

    Args:
        spec: The base's dimensions.
        width: Width d/r of the side network.
        num_heads: Number of heads; keys and values have as many.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, spec: DecoderSpec, width: int, num_heads: int) -> None:
        super().__init__()
        self.config = spec.config
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = nn.Linear(width, 3 * width, bias=spec.centered_norm, dtype=torch.float32)
        self.o_proj = nn.Linear(width, width, bias=spec.centered_norm, dtype=torch.float32)

    def forward(self, hidden_states: Tensor, inputs: BlockInputs) -> Tensor:
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
    """The base's mask, if it means the same for other heads than the base's.

    Raises:
        NotImplementedError: when it does not.
    """
    if implementation.startswith("paged"):
        raise NotImplementedError(
            f"Attention implementation {implementation} keeps keys and values in pages, where the side network has "
            "none; generate without continuous batching."
        )
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1:
        raise NotImplementedError(
            f"The base passes an attention mask for each of its {mask.shape[1]} heads (ALiBi), which means nothing "
            "to the side network's; side tuning does not support this architecture yet."
        )
    if implementation == "eager" and isinstance(mask, Tensor) and mask.dtype == torch.bool:
        # Elsewhere True means "attend"; in MPT's own attention it means "do not", and the side network would see ahead.
        raise NotImplementedError(
            "The base's own attention takes a boolean mask, whose sense is not known; side tuning does not support "
            "this architecture yet."
        )
    return mask


class SideMLP(nn.Module):
    """MLP of the side network, gated where the base's is."""

    def __init__(self, spec: DecoderSpec, width: int, r: int) -> None:
        super().__init__()
        inner = max(1, spec.intermediate_size // r)
        self.gated = spec.gated_mlp
        up = 2 * inner if self.gated else inner
        self.up_proj = nn.Linear(width, up, bias=spec.centered_norm, dtype=torch.float32)
        self.down_proj = nn.Linear(inner, width, bias=spec.centered_norm, dtype=torch.float32)
        self.activation = ACT2FN[spec.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (batch, length, d/r) to the same shape."""
        inner = self.up_proj(hidden_states)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return self.down_proj(self.activation(gate) * up)
        return self.down_proj(self.activation(inner))


class SideBlock(nn.Module):
    """Pre-norm transformer block of the side network.

    Args:
        spec: The base's dimensions.
        width: Width d/r.
        r: Reduction factor, for the MLP's inner width.
        num_heads: Attention heads; with none, the block is an MLP alone.
        dropout: Dropout probability on both branches' outputs.
    """

    def __init__(self, spec: DecoderSpec, width: int, r: int, num_heads: int | None, dropout: float) -> None:
        super().__init__()
        self.attends = num_heads is not None
        if num_heads is not None:
            self.attention_norm = make_norm(spec, width)
            self.attention = SideAttention(spec, width, num_heads)
        self.mlp_norm = make_norm(spec, width)
        self.mlp = SideMLP(spec, width, r)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, inputs: BlockInputs) -> Tensor:
        """One block; `hidden_states` and the result are (batch, length, d/r)."""
        if self.attends:
            attended = self.attention(self.attention_norm(hidden_states), inputs)
            hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
