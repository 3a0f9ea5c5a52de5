"""The down-samplers of QST (ACL 2024, section 3.2 and table 6), and one more: a hidden state, r times narrower.

    linear    t = W h                    W: d/r x d
    lora      t = L2 L1 h                L1: k x d, L2: d/r x k
    adapter   t = L2 silu(L1 h)
    maxpool   t_j = max h_(jr) .. h_(jr+r-1)
    avgpool   t_j = mean h_(jr) .. h_(jr+r-1)
    projection  t = L2 P h               P: k x d, orthonormal rows, frozen; ours, after LoRA-FA (arXiv 2308.03303)

The learned three need h, d wide, in their backward pass; the pooled two hold t, and the projection P h, k wide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SideTuningConfig


class Pool(nn.Module):
    """Max or mean over groups of `r` neighbouring channels; has no parameters and needs no gradient."""

    def __init__(self, r: int, kind: str) -> None:
        super().__init__()
        self.r = r
        self.kind = kind

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Pool (..., d) to (..., d/r) in the same dtype."""
        groups = hidden_states.unflatten(-1, (-1, self.r))  # (..., d) -> (..., d/r, r)
        if self.kind == "maxpool":
            return groups.amax(-1)
        # The sum in float32; its mean is no more exact than the 16-bit hidden states it is kept like.
        return groups.mean(-1, dtype=torch.promote_types(groups.dtype, torch.float32)).to(groups.dtype)


class Projection(nn.Module):
    """A frozen map to `rank` channels with orthonormal rows, random until `fit_projections` chooses it."""

    weight: Tensor

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        weight = torch.empty(rank, hidden_size, dtype=torch.float32)
        # Saved with the adapter: a generator's numbers are not the same everywhere and for ever.
        self.register_buffer("weight", weight if weight.is_meta else nn.init.orthogonal_(weight))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., d) to (..., rank)."""
        return F.linear(hidden_states, self.weight)


def make_downsample(config: SideTuningConfig, hidden_size: int) -> nn.Module:
    """The down-sampler that `config` names.

    Args:
        config: Its `downsample`, `downsample_rank` and `r` are read.
        hidden_size: Width d of the base's hidden states.

    Returns:
        A module from (..., d) to (..., d / r).
    """
    width = hidden_size // config.reduction_factor
    if config.downsample in ("maxpool", "avgpool"):
        return Pool(config.reduction_factor, config.downsample)
    if config.downsample == "linear":
        return nn.Linear(hidden_size, width, bias=False, dtype=torch.float32)
    rank = config.downsample_rank
    second = nn.Linear(rank, width, bias=False, dtype=torch.float32)
    if config.downsample == "projection":
        return nn.Sequential(Projection(hidden_size, rank), second)
    first = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
    middle = [nn.SiLU()] if config.downsample == "adapter" else []
    return nn.Sequential(first, *middle, second)
