"""Centers of the taps: what the hidden states that a loss reads have in common is taken off them.

    t = down(h - c),      c = mean of h over the positions that are read, in the first pass of training

Most of a hidden state is the same in every row: nearly all of it in the last token of a chat template, which
classifiers read. A down-sampler's gradient is then that of the common part, and what tells rows apart is hardly learned
(docs/quality.md). A position is read where the loss has a gradient. The first pass runs with c = 0: a mixture that
starts at the base's final state does so whatever enters the side network.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def mean_where_read(states: list[Tensor], gradient: Tensor) -> Tensor | None:
    """The mean hidden state of every tap over the positions that a loss reads, in all processes together.

    Args:
        states: Of every tap, (batch, length, d).
        gradient: Of the loss by the mixture, (batch, length, d).

    Returns:
        (taps, d), float32; None if no position is read.
    """
    read = gradient.ne(0).any(-1)  # (batch, length)
    sums = torch.stack([state[read.to(state.device)].float().sum(0).to(read.device) for state in states])  # (taps, d)
    count = read.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(count)
    return sums / count if count else None
