"""What a side network takes over from its base: sizes, the kind of norm and MLP, and how it attends."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnsupportedBaseError(ValueError):
    """The base computes something in a form that side tuning cannot follow."""


@dataclass(frozen=True)
class BaseShape:
    """The base as its side network sees it.

    Attributes:
        hidden_size: Width d of the hidden states.
        activation: Name of the MLP's activation, a key of `transformers.activations.ACT2FN`.
        gated_mlp: Whether the MLP multiplies by a gate.
        centered_norm: Whether the norm subtracts the mean and has a bias (LayerNorm), or not (RMSNorm).
        config: The base's (text) configuration, which says how it attends.
    """

    hidden_size: int
    num_layers: int
    intermediate_size: int
    activation: str
    gated_mlp: bool
    centered_norm: bool
    norm_eps: float
    rotary: bool
    config: Any

    def make_norm(self, width: int) -> nn.Module:
        """A norm of the base's kind: LayerNorm where the base centers, RMSNorm where it does not."""
        kind = LayerNorm if self.centered_norm else RMSNorm
        return kind(width, eps=self.norm_eps, dtype=torch.float32)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input.

    Autocast would widen the input to float32 and save that for backward, though the kernels sum in float32 anyway.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Normalize `states` (..., width)."""
        weight, bias = self.weight, self.bias
        if not torch.is_autocast_enabled(states.device.type):
            return super().forward(states)
        with torch.autocast(states.device.type, enabled=False):
            return F.layer_norm(states, self.normalized_shape, weight.to(states.dtype), bias.to(states.dtype), self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input; see `LayerNorm`."""

    def forward(self, states: Tensor) -> Tensor:
        """Normalize `states` (..., width)."""
        if not torch.is_autocast_enabled(states.device.type):
            return super().forward(states)
        with torch.autocast(states.device.type, enabled=False):
            return F.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)
