"""The two gates of QST: how a tap enters the side network, and how the side network's output enters the base.

Input gate of side block i, and output mixture, with t the tap, g the side state, f the final hidden state:

                input gate                                      output
    additive    x = t + g                                       h = f + up(g) + s W n(f),   up = 0, W = 0 at the start
    residual    x = (1-b) t + b g,  b = sigmoid(c), c = 0_d/r    h = f + up(g),                 up = 0 at the start
    paper       x = (1-b) t + b g,  b = sigmoid(c), c = 0        h = a f + (1-a) up(g),         a = 1
    reference   x = (1-b) t + b g,  b = sigmoid(c), c = 0.5_d/r  h = s f + (1-s) up(g),         s = sigmoid(1_d)

`paper` is the publication (ACL 2024, section 3.3): scalar gates, a used as it is. `reference` is the authors' code:
vector gates, and for LayerNorm families (OPT) the roles of f and up(g) are exchanged. The others are ours: `paper`
gives the side network no gradient at the start (it is scaled by 1-a = 0) and `reference` does not start at the base.
`additive` has no gates, and a linear map W of n(f) = f / rms(f): all its features are there from the start, so what it
can learn of a task it learns in few steps (docs/quality.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A step of Adam moves W n(f) by up to d times the learning rate, as all signs may agree: s = CORRECTION_WIDTH / d, so
# that a rate which suits the side network suits W beside it, at every width. Chosen at d = 576.
CORRECTION_WIDTH = 128
# Of n(f); the default of a dtype would make another function of each.
EPS = 1e-6


class InputGate(nn.Module):
    """Blend of a down-sampled hidden state with the state of the side network.

    Args:
        mixing: `"additive"`, `"residual"`, `"paper"` or `"reference"`.
        width: Width d/r of the side network.
    """

    weight: nn.Parameter | None

    def __init__(self, mixing: str, width: int) -> None:
        super().__init__()
        size = () if mixing == "paper" else (width,)
        start = torch.full(size, 0.5 if mixing == "reference" else 0.0, dtype=torch.float32)
        self.register_parameter("weight", None if mixing == "additive" else nn.Parameter(start))

    def forward(self, tap: Tensor, side: Tensor) -> Tensor:
        """Blend `tap` and `side`, both (batch, length, d/r)."""
        if self.weight is None:
            return tap + side
        return torch.lerp(tap, side, torch.sigmoid(self.weight).to(side.dtype))


class OutputMix(nn.Module):
    """Up-projection of the side network and its mixture with the base's final hidden state.

    Args:
        mixing: `"additive"`, `"residual"`, `"paper"` or `"reference"`.
        width: Width d/r of the side network.
        hidden_size: Width d of the base.
        swapped: In `"reference"`, whether the gate weighs the side network instead of the base.
    """

    def __init__(self, mixing: str, width: int, hidden_size: int, swapped: bool) -> None:
        super().__init__()
        self.mixing = mixing
        self.swapped = swapped
        self.up_proj = nn.Linear(width, hidden_size, dtype=torch.float32)
        if mixing in ("additive", "residual"):
            nn.init.zeros_(self.up_proj.weight)
            nn.init.zeros_(self.up_proj.bias)
        if mixing == "additive":
            self.correction = nn.Linear(hidden_size, hidden_size, bias=False, dtype=torch.float32)
            nn.init.zeros_(self.correction.weight)
        elif mixing != "residual":
            size = () if mixing == "paper" else (hidden_size,)
            self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))

    def forward(self, base: Tensor, side: Tensor) -> Tensor:
        """Mix `base` (batch, length, d) with `side` (batch, length, d/r); the result has the dtype of `base`."""
        up = self.up_proj(side)  # (batch, length, d)
        if self.mixing == "additive":
            up = up + CORRECTION_WIDTH / base.shape[-1] * self._corrected(base).to(up.dtype)
        if self.mixing in ("additive", "residual"):
            return base + up.to(base.dtype)
        gate = torch.sigmoid(self.weight) if self.mixing == "reference" else self.weight
        first, second = (up, base) if self.swapped else (base, up)
        return (gate * first + (1 - gate) * second).to(base.dtype)

    def _corrected(self, base: Tensor) -> Tensor:
        width = base.shape[-1:]
        if torch.is_autocast_enabled(base.device.type):
            with torch.autocast(base.device.type, enabled=False):
                normed = F.rms_norm(base, width, eps=EPS)  # (batch, length, d), in 16 bits: it is held for backward
        else:
            normed = F.rms_norm(base.to(self.correction.weight.dtype), width, eps=EPS)
        corrected: Tensor = self.correction(normed)
        return corrected
