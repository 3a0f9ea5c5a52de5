"""The gates of QST: how a tap enters the side network, and how the side network's output enters the base.

Input gate of side block i, and output mixture, with t the tap, g the side state, f the final hidden state:

                input gate                                      output
    additive    x = t + g                                       h = f + up(g) + s W n(f),   up = 0, W = 0 at the start
    paper       x = (1-b) t + b g,  b = sigmoid(c), c = 0        h = a f + (1-a) up(g),         a = 1
    reference   x = (1-b) t + b g,  b = sigmoid(c), c = 0.5_d/r  h = s f + (1-s) up(g),         s = sigmoid(1_d)

`paper` is the publication (ACL 2024, section 3.3): scalar gates, a used as it is; the side network has no gradient in
the first step, as its output is scaled by 1-a = 0. `reference` is the authors' code: vector gates, and for LayerNorm
families (OPT) the roles of f and up(g) are exchanged; it does not start at the base. `additive`, the default, is ours:
no gates, and a linear map W of n(f) = f / rms(f), whose features are all there from the start (docs/quality.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...registry import Registry
from .shape import BaseShape

# A step of Adam moves W n(f) by up to d times the learning rate, as all signs may agree: s = CORRECTION_WIDTH / d, so
# that a rate which suits the side network suits W beside it, at every width. Chosen at d = 576.
CORRECTION_WIDTH = 128
# Of n(f); the default of a dtype would make another function of each.
EPS = 1e-6


class Sum(nn.Module):
    """Input gate without a parameter: the sum."""

    def forward(self, tap: Tensor, side: Tensor) -> Tensor:
        """Add `tap` and `side`, both (batch, length, d/r)."""
        return tap + side


class SigmoidGate(nn.Module):
    """Input gate: a blend with learned weights, which `start`, (1,) or (d/r,), are before the sigmoid."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)

    def forward(self, tap: Tensor, side: Tensor) -> Tensor:
        """Blend `tap` and `side`, both (batch, length, d/r)."""
        return torch.lerp(tap, side, torch.sigmoid(self.weight).to(side.dtype))


class Mixing(nn.Module):
    """Base class of the mixings: `input_gate` makes the gate of one side block, `forward` is the output mixture."""

    # The authors' code has a LayerNorm behind its down-samplers, whatever norm the base has.
    layer_norm_taps = False

    def __init__(self, width: int, shape: BaseShape) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, shape.hidden_size, dtype=torch.float32)

    @staticmethod
    def input_gate(width: int) -> nn.Module:
        """A module that makes the input of a side block from tap and side state, both (batch, length, d/r)."""
        raise NotImplementedError

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """Mix `base` (batch, length, d) with `side` (batch, length, d/r); the result has the dtype of `base`."""
        raise NotImplementedError


MIXINGS: Registry[type[Mixing]] = Registry("mixing")


@MIXINGS.register("additive")
class Additive(Mixing):
    """No gates, and a linear map of the base's final state; starts exactly at the base."""

    def __init__(self, width: int, shape: BaseShape) -> None:
        super().__init__(width, shape)
        self.correction = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False, dtype=torch.float32)
        for start in (self.up_proj.weight, self.up_proj.bias, self.correction.weight):
            nn.init.zeros_(start)

    @staticmethod
    def input_gate(width: int) -> nn.Module:
        """The sum."""
        return Sum()

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """H = f + up(g) + s W n(f)."""
        up = self.up_proj(side)  # (batch, length, d)
        return base + (up + CORRECTION_WIDTH / base.shape[-1] * self._corrected(base).to(up.dtype)).to(base.dtype)

    def _corrected(self, base: Tensor) -> Tensor:
        width = base.shape[-1:]
        if torch.is_autocast_enabled(base.device.type):
            with torch.autocast(base.device.type, enabled=False):
                normed = F.rms_norm(base, width, eps=EPS)  # (batch, length, d), in 16 bits: it is saved for backward
        else:
            normed = F.rms_norm(base.to(self.correction.weight.dtype), width, eps=EPS)
        return self.correction(normed)


@MIXINGS.register("paper")
class Paper(Mixing):
    """Scalar gates, as published; starts exactly at the base."""

    def __init__(self, width: int, shape: BaseShape) -> None:
        super().__init__(width, shape)
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float32))

    @staticmethod
    def input_gate(width: int) -> nn.Module:
        """One half of each at the start."""
        return SigmoidGate(torch.zeros(1, dtype=torch.float32))

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """H = a f + (1 - a) up(g)."""
        return (self.weight * base + (1 - self.weight) * self.up_proj(side)).to(base.dtype)


@MIXINGS.register("reference")
class Reference(Mixing):
    """Vector gates, as in the authors' code."""

    layer_norm_taps = True

    def __init__(self, width: int, shape: BaseShape) -> None:
        super().__init__(width, shape)
        self.swapped = shape.centered_norm
        self.weight = nn.Parameter(torch.ones(shape.hidden_size, dtype=torch.float32))

    @staticmethod
    def input_gate(width: int) -> nn.Module:
        """A little more of the side state than of the tap at the start."""
        return SigmoidGate(torch.full((width,), 0.5, dtype=torch.float32))

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """H = s f + (1 - s) up(g); f and up(g) change places beside LayerNorm families."""
        gate, up = torch.sigmoid(self.weight), self.up_proj(side)
        first, second = (up, base) if self.swapped else (base, up)
        return (gate * first + (1 - gate) * second).to(base.dtype)
