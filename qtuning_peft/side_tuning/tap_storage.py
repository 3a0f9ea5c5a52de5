"""How learned down-samplers come by the base's hidden states again, which their gradient needs: dW = delta^T h.

    full         held as they are: 2 d bytes a token and tap in 16 bits
    int8, int4   held as q = round(h / s), with one s = max |h| / (2^(b-1) - 1) for 64 numbers:
                 1.03 d and 0.53 d bytes; what enters the side network stays exact, dW does not
    recompute    not held: delta is, and when the last of them is known, the base runs once more and gives every h
                 in turn; exact, at the price of a base forward

(QST, ACL 2024, trains its down-samplers; what that holds is as much as checkpointing holds for QLoRA.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64


class TapStorage:
    """Applies down-samplers, and holds their input for backward as it is.

    Attributes:
        seen: Taps before their centers are taken off, each (batch, length, d), in a pass that measures these.
    """

    seen: list[Tensor] | None = None

    def narrow(self, index: int, down: nn.Module, hidden_states: Tensor) -> Tensor:
        """Down-sample tap `index` (0 for the embeddings), from (batch, length, d) to (batch, length, d/r)."""
        narrow: Tensor = down(hidden_states)
        return narrow


class Quantized(NamedTuple):
    """Numbers in groups, with a scale for each group."""

    values: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, states: Tensor, bits: int) -> Quantized:
        """Quantize `states` (..., d) to 8 or 4 bits; two of 4 bits share a byte."""
        largest = 2 ** (bits - 1) - 1
        size = math.gcd(states.shape[-1], GROUP)
        groups = states.reshape(-1, size if size % 2 == 0 else states.shape[-1])
        scales = groups.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / largest
        values = (groups / scales).round_().to(torch.int8)  # (groups, group)
        if bits == 4:
            nibbles = F.pad((values + 8).to(torch.uint8), (0, values.shape[-1] % 2))
            values = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        return cls(values, scales.to(torch.bfloat16), states.shape, states.dtype)

    def restore(self) -> Tensor:
        """The numbers, in their shape and dtype."""
        values = self.values
        if values.dtype == torch.uint8:
            nibbles = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)  # (groups, group)
            values = nibbles[:, : self.shape.numel() // len(nibbles)].to(torch.int8) - 8
        return (values * self.scales.float()).view(self.shape).to(self.dtype)


class QuantizedTaps(TapStorage):
    """Holds down-samplers' input in 8 or 4 bits."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def narrow(self, index: int, down: nn.Module, hidden_states: Tensor) -> Tensor:
        """As `TapStorage` does."""
        first: Tensor = _RoundedInput.apply(hidden_states, _first(down).weight, self.bits)
        return _rest(down)(first)


class RecomputedTaps(TapStorage):
    """Holds nothing of down-samplers' input: runs the base again in backward.

    Args:
        downs: The down-samplers, that of the embeddings first.
        centers: What is taken off their input, each (d,); none if nothing is.
        run_base: Runs the base once more, and hands the embeddings and every tapped block's output to its argument.
    """

    def __init__(self, downs: list[nn.Module], centers: list[Tensor], run_base: RunBase) -> None:
        self.run_base = run_base
        # As they are in this forward pass: its own backward may set them.
        self.centers = torch.stack(centers) if centers else None  # (taps, d)
        self.deltas: list[Tensor | None] = [None] * len(downs)
        weights = [_first(down).weight for down in downs]
        # Down-samplers get their weights from this one node, so that autograd knows when all of them had backward.
        self.weights: tuple[Tensor, ...] = _GradientFromBase.apply(self, *weights)

    def narrow(self, index: int, down: nn.Module, hidden_states: Tensor) -> Tensor:
        """As `TapStorage` does."""
        first: Tensor = _WithoutInput.apply(hidden_states, self.weights[index], self, index)
        return _rest(down)(first)


class TapReader:
    """Takes the base's states one by one, as `BaseStates` does, and keeps only the down-samplers' gradients.

    Attributes:
        gradients: For every tap, the embeddings first.
    """

    normed: Tensor | None = None

    def __init__(self, deltas: list[Tensor | None], centers: Tensor | None) -> None:
        self.deltas, self.centers = deltas, centers
        self.gradients: list[Tensor | None] = []

    @property
    def embeddings(self) -> Tensor | None:
        """Not kept."""
        return None

    @embeddings.setter
    def embeddings(self, hidden_states: Tensor) -> None:
        self._read(hidden_states)

    def add_block(self, block: nn.Module, arguments: dict[str, Any], hidden_states: Tensor) -> None:
        """Take the output (batch, length, d) of a tapped block."""
        self._read(hidden_states)

    def _read(self, hidden_states: Tensor) -> None:
        if len(self.gradients) < len(self.deltas):
            tap = len(self.gradients)
            delta = self.deltas[tap]  # (batch, length, width)
            if self.centers is not None:
                hidden_states = hidden_states.to(self.centers.device) - self.centers[tap]
            self.gradients.append(None if delta is None else _weight_gradient(delta, hidden_states))


RunBase = Callable[[TapReader], None]


class _RoundedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, bits: int) -> Tensor:
        narrow = F.linear(hidden_states, weight)
        held = Quantized.of(hidden_states.to(narrow.dtype), bits)
        ctx.shape, ctx.dtype, ctx.weight_dtype = held.shape, held.dtype, weight.dtype
        ctx.save_for_backward(held.values, held.scales)
        return narrow

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[None, Tensor, None]:
        values, scales = ctx.saved_tensors
        states = Quantized(values, scales, ctx.shape, ctx.dtype).restore()
        return None, _weight_gradient(delta, states).to(ctx.weight_dtype), None


class _GradientFromBase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, taps: RecomputedTaps, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.taps = taps
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *nothing: None) -> tuple[Tensor | None, ...]:
        reader = TapReader(ctx.taps.deltas, ctx.taps.centers)
        ctx.taps.run_base(reader)
        if len(reader.gradients) != len(ctx.dtypes):
            raise RuntimeError(
                f"tap_storage is recompute, and the base gave {len(reader.gradients)} of {len(ctx.dtypes)} taps in "
                "backward; leave the active adapter as it was in forward, or set tap_storage to full."
            )
        pairs = zip(reader.gradients, ctx.dtypes, strict=True)
        return None, *(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs)


class _WithoutInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, taps: RecomputedTaps, index: int) -> Tensor:
        ctx.taps, ctx.index = taps, index
        return F.linear(hidden_states, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[None, None, None, None]:
        ctx.taps.deltas[ctx.index] = delta
        return None, None, None, None


def _weight_gradient(delta: Tensor, hidden_states: Tensor) -> Tensor:
    """(batch, length, width) and (batch, length, d) to (width, d)."""
    return delta.flatten(0, -2).T @ hidden_states.flatten(0, -2).to(delta.device, delta.dtype)


def _first(down: nn.Module) -> nn.Linear:
    first = down if isinstance(down, nn.Linear) else next(iter(down.children()))
    assert isinstance(first, nn.Linear)
    return first


def _rest(down: nn.Module) -> nn.Sequential:
    return nn.Sequential(*list(down.children())[1:])  # of a linear one, nothing


def make_tap_storage(
    kind: str, downs: list[nn.Module], centers: list[Tensor], run_base: RunBase | None, training: bool
) -> TapStorage:
    """The storage that `kind` names, for one forward pass.

    Args:
        kind: `"full"`, `"int8"`, `"int4"` or `"recompute"`.
        downs: The down-samplers, that of the embeddings first.
        centers: What is taken off their input, each (d,); none if nothing is.
        run_base: See `RecomputedTaps`.
        training: Whether a backward pass may follow.
    """
    if kind == "full" or not training:
        return TapStorage()
    if kind == "recompute":
        assert run_base is not None
        return RecomputedTaps(downs, centers, run_base)
    return QuantizedTaps(int(kind.removeprefix("int")))
