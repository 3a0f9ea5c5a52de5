"""One block of the side network: a pre-norm transformer block, r times narrower than the base's.

    y = x + attention(norm(x))        g = y + mlp(norm(y))        (QST, ACL 2024, section 3.1: "a lightweight f")

Without `side_attention` y = x: a hidden state of the base holds already what its attention has gathered.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .attention import AttentionInputs, SideAttention
from .shape import BaseShape


class SideMLP(nn.Module):
    """MLP of the side network, gated where the base's is."""

    def __init__(self, shape: BaseShape, width: int) -> None:
        super().__init__()
        inner = max(1, shape.intermediate_size * width // shape.hidden_size)
        self.gated = shape.gated_mlp
        up = 2 * inner if self.gated else inner
        self.up_proj = nn.Linear(width, up, bias=shape.centered_norm, dtype=torch.float32)
        self.down_proj = nn.Linear(inner, width, bias=shape.centered_norm, dtype=torch.float32)
        self.activation = ACT2FN[shape.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (batch, length, d/r) to the same shape."""
        inner = self.up_proj(hidden_states)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return self.down_proj(self.activation(gate) * up)
        return self.down_proj(self.activation(inner))


class SideBlock(nn.Module):
    """Pre-norm transformer block, `width` d/r wide; with `num_heads` of `None` an MLP alone."""

    def __init__(self, shape: BaseShape, width: int, num_heads: int | None, dropout: float) -> None:
        super().__init__()
        self.attends = num_heads is not None
        if num_heads is not None:
            self.attention_norm = shape.make_norm(width)
            self.attention = SideAttention(shape, width, num_heads)
        self.mlp_norm = shape.make_norm(width)
        self.mlp = SideMLP(shape, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, inputs: AttentionInputs | None = None) -> Tensor:
        """One block; `hidden_states` and the result are (batch, length, d/r), `inputs` what attention needs besides."""
        if self.attends:
            assert inputs is not None
            attended = self.attention(self.attention_norm(hidden_states), inputs)
            hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
