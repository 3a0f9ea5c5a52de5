"""Experimental networks: from the cached hidden states of the base to a final hidden state.

    f' = f + U norm(g_n) + sum_i W_i z_i,        g_j = block(gate(g_(j-1), D_j s_j)),        z_i = normalized(s_i)

s_i is the state after block i of the base, s_0 the embeddings, f the final norm's output. U and W start at zero: every
network starts as the base. What the command `ablations` varies are the fields of `Options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.base_blocks import BaseAttention, LateBlocks, salient_channels, start_from_base
from benchmarks.quality.states import normalized
from benchmarks.quality.tasks import Batch

LAST = 30
FINAL = LAST + 1  # in `linear`: the final norm's output instead of a state
EPSILON, ROPE_BASE = 1e-5, 100_000.0
# Statistics of states are taken over this many batches, every second token; small variances are not blown up.
STATISTICS_BATCHES, WHITENING_FLOOR = 12, 0.01


@dataclass(frozen=True)
class Options:
    """What a network is made of.

    Attributes:
        blocks: States the side network reads after the embeddings, a side block each; none: no side network.
        reduction_factor: The base's width over the side network's.
        attention: Of a side block: its own, where the base attends, or none.
        mlp: Whether a side block has one.
        gate: How a tap enters: lerp(tap, g, sigmoid(a)), a zero at the start, or g + tap.
        tap: What is down-sampled: a state, or its difference from the one read before.
        norm: Of a tap: after its down-sampler, or before it.
        from_base: Down-samplers and side MLPs start from the base's weights.
        linear: States whose maps are added to the output.
        rank: Of these maps; 0 is full.
        hidden: Units of an MLP in their place; 0 is none.
        white: Whether their inputs are whitened.
        late: Last blocks of the base that are run again, on their first state plus what the network adds.
        lora: Rank of LoRA on these blocks; 0 leaves them frozen.
    """

    blocks: tuple[int, ...] = tuple(range(1, LAST + 1))
    reduction_factor: int = 8
    attention: Literal["side", "base", "none"] = "side"
    mlp: bool = True
    gate: Literal["lerp", "add"] = "lerp"
    tap: Literal["state", "difference"] = "state"
    norm: Literal["after", "before"] = "after"
    from_base: bool = False
    linear: tuple[int, ...] = ()
    rank: int = 0
    hidden: int = 0
    white: bool = False
    late: int = 0
    lora: int = 0


class SideAttention(nn.Module):
    """Causal attention over normalized side states, with rotary positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Side state (batch, length, w), and the base's (batch, length, d), which is not read, to (..., w)."""
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, w / heads)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021) of (..., length, size)."""
    length, size = x.shape[-2:]
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = torch.outer(torch.arange(length, device=x.device), frequency)  # (length, size / 2)
    (a, b), cos, sin = x.chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, units, bias=False) for _ in range(2))
        self.down = nn.Linear(units, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., w) to (..., w)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SideBlock(nn.Module):
    """x + attention(x), then x + MLP(norm(x)); what the options leave out is left out."""

    def __init__(self, options: Options, base: Any, number: int, width: int) -> None:
        super().__init__()
        self.attention: nn.Module | None = None
        if options.attention != "none":
            own = options.attention == "side"
            self.attention = SideAttention(width) if own else BaseAttention(base, number, width)
        units = width * base.config.intermediate_size // base.config.hidden_size
        self.norm = nn.RMSNorm(width, eps=EPSILON) if options.mlp else None
        self.mlp = MLP(width, units) if options.mlp else None

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Side state (batch, length, w), and the state the base's block reads (batch, length, d), to a side state."""
        if self.attention is not None:
            x = x + self.attention(x, before)
        if self.mlp is not None and self.norm is not None:
            x = x + self.mlp(self.norm(x))
        return x


class SideNetwork(nn.Module):
    """Narrow blocks that read states of the base one after another; U is `up`."""

    def __init__(self, options: Options, base: Any) -> None:
        super().__init__()
        size, count = base.config.hidden_size, len(options.blocks)
        width = size // options.reduction_factor
        self.options = options
        downs = [nn.Linear(size, width, bias=False) for _ in range(count + 1)]
        self.down = nn.ModuleList(downs)
        after = options.norm == "after"
        self.tap_norm = nn.ModuleList(nn.RMSNorm(width, eps=EPSILON) for _ in range(count + 1)) if after else None
        gated = count if options.gate == "lerp" else 0
        self.gates = nn.ParameterList(torch.zeros(width) for _ in range(gated))
        self.blocks = nn.ModuleList(SideBlock(options, base, number, width) for number in options.blocks)
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.up = zero(nn.Linear(width, size))
        if options.from_base:
            channels = salient_channels(base, width)
            start_from_base(downs[0], channels)
            for number, down, block in zip(options.blocks, downs[1:], self.blocks, strict=True):
                start_from_base(down, channels, base.model.layers[number - 1], block.mlp, block.norm)

    def forward(self, taps: Tensor) -> Tensor:
        """(31, batch, length, d) to what is added to the output, (batch, length, d)."""
        previous = taps[0].float()
        x = self._tap(0, previous)  # (batch, length, w)
        for place, number in enumerate(self.options.blocks, start=1):
            state = taps[number].float()
            tap = self._tap(place, state - previous if self.options.tap == "difference" else state)
            previous = state
            x = x + tap if self.options.gate == "add" else torch.lerp(tap, x, self.gates[place - 1].sigmoid())
            x = self.blocks[place - 1](x, taps[number - 1])
        return self.up(self.norm(x))

    def _tap(self, place: int, state: Tensor) -> Tensor:
        # A down-sampler has no bias, so that a norm before it changes nothing where there is one after it.
        if self.tap_norm is None:
            return self.down[place](normalized(state))
        return self.tap_norm[place](self.down[place](state))


class Whitening(nn.Module):
    """V^T (z - mean) / sqrt(e + 0.01 mean(e)): directions of no correlation and like size, from the covariance V e V^T.

    Args:
        sample: (tokens, d), what mean and covariance are taken of.
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        mean = sample.mean(0)
        variances, directions = torch.linalg.eigh((sample - mean).T @ (sample - mean) / len(sample))
        self.register_buffer("mean", mean)
        scale = (variances.clamp(min=0) + WHITENING_FLOOR * variances.mean()).rsqrt()
        self.register_buffer("directions", directions * scale)  # (d, d)

    def forward(self, z: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        return (z - self.mean) @ self.directions


class LinearMaps(nn.Module):
    """sum_i W_i z_i; a W is full, of low rank, or an MLP of one hidden layer."""

    def __init__(self, options: Options, size: int, train: list[Batch]) -> None:
        super().__init__()
        self.numbers = options.linear
        self.maps = nn.ModuleList(self._map(options, size) for _ in self.numbers)
        self.white = nn.ModuleList(
            Whitening(sampled(number, train)) if options.white else nn.Identity() for number in self.numbers
        )

    @staticmethod
    def _map(options: Options, size: int) -> nn.Module:
        if options.hidden:
            inner, last = nn.Linear(size, options.hidden), nn.Linear(options.hidden, size)
            return nn.Sequential(inner, nn.SiLU(), zero(last))
        if options.rank:
            return nn.Sequential(nn.Linear(size, options.rank, bias=False), zero(nn.Linear(options.rank, size)))
        return zero(nn.Linear(size, size))

    def forward(self, taps: Tensor, normed: Tensor) -> Tensor:
        """(31, batch, length, d) and (batch, length, d) to what is added to the output, (batch, length, d)."""
        states = [normed if number == FINAL else normalized(taps[number]) for number in self.numbers]
        parts = [m(white(z)) for m, white, z in zip(self.maps, self.white, states, strict=True)]
        return torch.stack(parts).sum(0)


def sampled(number: int, train: list[Batch]) -> Tensor:
    """State `number`, normalized, of every second token of the first batches: (tokens, d)."""
    few = train[:STATISTICS_BATCHES]
    return torch.cat([normalized(batch["taps"][number][batch["attention_mask"].bool()][::2]) for batch in few])


def zero(linear: nn.Linear) -> nn.Linear:
    """`linear`, which starts at zero."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Network(nn.Module):
    """What `options` say, beside `base`.

    Args:
        options: Its parts.
        base: The base in float32, frozen.
        train: Cached states, for statistics of them.
    """

    def __init__(self, options: Options, base: Any, train: list[Batch]) -> None:
        super().__init__()
        self.side = SideNetwork(options, base) if options.blocks else None
        self.linear = LinearMaps(options, base.config.hidden_size, train) if options.linear else None
        self.late = LateBlocks(base, options.late, options.lora) if options.late else None

    def forward(self, taps: Tensor, normed: Tensor) -> Tensor:
        """(31, batch, length, d) and the base's final hidden state (batch, length, d) to another of its shape."""
        update: Tensor | float = 0.0
        if self.side is not None:
            update = update + self.side(taps)
        if self.linear is not None:
            update = update + self.linear(taps, normed)
        return normed + update if self.late is None else self.late(taps, update)
