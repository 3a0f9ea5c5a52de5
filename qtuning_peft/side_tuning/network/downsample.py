"""The down-samplers of QST (ACL 2024, section 3.2 and table 6), and one more: a hidden state, r times narrower.

    linear      t = W h                    W: d/r x d
    lora        t = L2 L1 h                L1: k x d, L2: d/r x k
    adapter     t = L2 silu(L1 h)
    projection  t = L2 P h                 P: k x d, orthonormal rows, frozen; ours, after LoRA-FA (arXiv 2308.03303)
    maxpool     t_j = max  of h_(jr) .. h_(jr+r-1)
    avgpool     t_j = mean of h_(jr) .. h_(jr+r-1)

The learned ones save h, d wide, for backward; the pooled ones save nothing, and the projection P h, k wide.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...registry import Registry

Make = Callable[[int, int, int], nn.Module]
M = TypeVar("M", bound=Make)


class DownSampler(NamedTuple):
    """`make`: from sizes d, d/r and rank k to a float32 module from (..., d) to (..., d/r); see `down_sampler`."""

    make: Make
    learned: bool


DOWNSAMPLERS: Registry[DownSampler] = Registry("downsample")


def down_sampler(name: str, learned: bool = True) -> Callable[[M], M]:
    """Decorator: register a down-sampler `name`, a `make`; `learned` says whether backward needs the hidden state."""

    def register(make: M) -> M:
        DOWNSAMPLERS.add(name, DownSampler(make, learned), make.__doc__)
        return make

    return register


def _linear(size: int, width: int) -> nn.Linear:
    return nn.Linear(size, width, bias=False, dtype=torch.float32)


@down_sampler("linear")
def linear(hidden_size: int, width: int, rank: int) -> nn.Module:
    """A learned matrix."""
    return _linear(hidden_size, width)


@down_sampler("lora")
def lora(hidden_size: int, width: int, rank: int) -> nn.Module:
    """Two learned matrices of rank `downsample_rank`."""
    return nn.Sequential(_linear(hidden_size, rank), _linear(rank, width))


@down_sampler("adapter")
def adapter(hidden_size: int, width: int, rank: int) -> nn.Module:
    """As lora, with a SiLU between the two, as published."""
    return nn.Sequential(_linear(hidden_size, rank), nn.SiLU(), _linear(rank, width))


@down_sampler("projection", learned=False)
def projection(hidden_size: int, width: int, rank: int) -> nn.Module:
    """As lora, the first matrix frozen: orthogonal, or fitted by `fit_projections`."""
    return nn.Sequential(Projection(hidden_size, rank), _linear(rank, width))


@down_sampler("maxpool", learned=False)
def maxpool(hidden_size: int, width: int, rank: int) -> nn.Module:
    """The maximum of neighbouring channels, nothing to learn."""
    return MaxPool(hidden_size // width)


@down_sampler("avgpool", learned=False)
def avgpool(hidden_size: int, width: int, rank: int) -> nn.Module:
    """The mean of neighbouring channels, nothing to learn."""
    return AvgPool(hidden_size // width)


class MaxPool(nn.Module):
    """Maximum over groups of `size` neighbouring channels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Pool (..., d) to (..., d/r) in the same dtype."""
        return hidden_states.unflatten(-1, (-1, self.size)).amax(-1)  # (..., d) -> (..., d/r, r) -> (..., d/r)


class AvgPool(MaxPool):
    """Mean over groups of `size` neighbouring channels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Pool (..., d) to (..., d/r) in the same dtype; the sum is in float32."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        return hidden_states.unflatten(-1, (-1, self.size)).mean(-1, dtype=wide).to(hidden_states.dtype)


class Projection(nn.Module):
    """A frozen map to `rank` channels with orthonormal rows, random until `fit_projections` chooses it."""

    weight: Tensor

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        weight = torch.empty(rank, hidden_size, dtype=torch.float32)
        # Saved with the adapter: a generator's numbers are not the same everywhere and for ever.
        self.register_buffer("weight", weight if weight.is_meta else nn.init.orthogonal_(weight))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project (..., d) to (..., rank)."""
        return nn.functional.linear(hidden_states, self.weight)
