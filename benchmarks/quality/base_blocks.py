"""The base's own blocks inside a side network: run again at the end, used for attention, or copied at the start.

    late blocks    f' = norm(block_30(... block_(31-k)(s_(30-k) + u))),    u what a side network adds, if there is one
    attention      o(softmax(q_l k_l^T) v),                                q_l, k_l of base block l; v, o trained
    start          down-sampler = w rows of the identity, side MLP = the base's, at these w channels

s_l is the state after block l. Gradients stop at s_(30-k). Start: LST (Sung, Cho and Bansal, 2022) prunes the base too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.quality.states import normalized

LORA_SCALE = 2.0  # alpha over r, as in `methods.LORA`
VALUE_SIZE = 16


class LoRALinear(nn.Module):
    """A frozen linear map and a trained low-rank one, zero at the start: W x + 2 B A x."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.a = nn.Linear(frozen.in_features, rank, bias=False)
        self.b = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return self.frozen(x) + LORA_SCALE * self.b(self.a(x))


class LateBlocks(nn.Module):
    """The last `count` blocks and the final norm of `base`, with LoRA of `rank` on every linear map unless it is 0."""

    def __init__(self, base: Any, count: int, rank: int) -> None:
        super().__init__()
        self.blocks = copy.deepcopy(base.model.layers[-count:])
        self.norm, self.rotary = base.model.norm, base.model.rotary_emb
        self.first = len(base.model.layers) - count
        linear = [name for name, module in self.blocks.named_modules() if isinstance(module, nn.Linear)]
        for name in linear if rank else ():
            parent, _, child = name.rpartition(".")
            lora = LoRALinear(self.blocks.get_submodule(name), rank)
            setattr(self.blocks.get_submodule(parent), child, lora)

    def forward(self, taps: Tensor, update: Tensor | float) -> Tensor:
        """(31, batch, length, d), and what is added to the state they begin with, to (batch, length, d)."""
        x = taps[self.first].float() + update
        rotary = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for block in self.blocks:  # padding is at the right, where no earlier position looks
            x = block(x, position_embeddings=rotary, attention_mask=None)
        return self.norm(x)


class BaseAttention(nn.Module):
    """Attention where block `number` of `base` attends, to trained values of the state that this block reads."""

    def __init__(self, base: Any, number: int, width: int) -> None:
        super().__init__()
        block = base.model.layers[number - 1]
        self.norm, self.q, self.k = block.input_layernorm, block.self_attn.q_proj, block.self_attn.k_proj
        self.rotary, self.head_size = base.model.rotary_emb, block.self_attn.head_dim
        heads = base.config.num_attention_heads
        self.v = nn.Linear(base.config.hidden_size, heads * VALUE_SIZE, bias=False)
        self.o = nn.Linear(heads * VALUE_SIZE, width, bias=False)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Side state (batch, length, w), which is not read, and the block's input (batch, length, d), to (..., w)."""
        with torch.no_grad():
            state = self.norm(before.float())
            q, k = (self._heads(part(state), self.head_size) for part in (self.q, self.k))  # (batch, heads, length, 64)
            q, k = apply_rotary_pos_emb(q, k, *self.rotary(state, torch.arange(x.shape[1], device=x.device)[None]))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = self._heads(self.v(normalized(before)), VALUE_SIZE)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, length, 16)
        return self.o(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _heads(x: Tensor, size: int) -> Tensor:
        return x.unflatten(-1, (-1, size)).transpose(1, 2)


def salient_channels(base: Any, width: int) -> Tensor:
    """The `width` channels that blocks write with the largest weights, in their order: (width,), int64."""
    written = [weight for block in base.model.layers for weight in (block.self_attn.o_proj, block.mlp.down_proj)]
    magnitude = torch.stack([linear.weight.abs().mean(1) for linear in written]).sum(0)  # (d,)
    return magnitude.topk(width).indices.sort().values


@torch.no_grad()
def start_from_base(down: nn.Linear, channels: Tensor, block: Any = None, mlp: Any = None, norm: Any = None) -> None:
    """Let a down-sampler select `channels` and, if it has one, a side MLP be that of the base's `block` there.

    Args:
        down: d to w.
        channels: (w,), int64.
        block: Of the base.
        mlp: Of the side network, with `gate`, `up` and `down`.
        norm: Before it.
    """
    down.weight.copy_(torch.eye(down.in_features)[channels])
    if mlp is None:
        return
    gate, up, back = (linear.weight for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj))
    gate, up, back = gate[:, channels], up[:, channels], back[channels]  # (units, w), (units, w), (w, units)
    units = (gate.norm(dim=1) * up.norm(dim=1) * back.norm(dim=0)).topk(mlp.gate.out_features).indices
    mlp.gate.weight.copy_(gate[units])
    mlp.up.weight.copy_(up[units])
    mlp.down.weight.copy_(back[:, units])
    norm.weight.copy_(block.post_attention_layernorm.weight[channels])
