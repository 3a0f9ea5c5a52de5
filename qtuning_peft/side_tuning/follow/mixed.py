"""A listener for a batch whose rows have side networks of their own: one pass of the base serves them all.

    h[row] = mix_a(f[row], g_a[row]),  a the row's adapter;         h[row] = f[row]  of `__base__`

A side network changes nothing in the base, so that its pass, its key-value cache and a cached prompt are the same for
every adapter. LoRA's are not.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .follower import BlockCall, Listener
from .positions import AtPositions

BASE = "__base__"


class MixedRows:
    """Hands every adapter's listener its rows; see [`Listener`].

    Args:
        names: An adapter's name, or `__base__`, for each row.
        listeners: Of the adapters.
    """

    def __init__(self, names: Sequence[str], listeners: Mapping[str, Listener]) -> None:
        self.names, self.listeners = names, listeners
        self.layers: Collection[int] = {layer for listener in listeners.values() for layer in listener.layers}
        self.parts: list[AtPositions] = []

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """Hand on the embeddings; a `ValueError` when `names` are not those of this batch."""
        batch, length = embeddings.shape[:2]
        if batch != len(self.names):
            raise ValueError(
                f"adapter_names has {len(self.names)} names for a batch of {batch} rows; give one for each."
            )
        for name, listener in self.listeners.items():
            # On the CPU, so that a GPU is not waited for.
            rows = torch.tensor([own == name for own in self.names])
            self.parts.append(AtPositions(listener, rows.unsqueeze(1).expand(batch, length)))
        for part in self.parts:
            part.begin(embeddings, call)

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> None:
        """Hand on a block's output to those that tap it."""
        for part in self.parts:
            if index in part.layers:
                part.block(index, hidden_states, call)

    def end(self, normed: Tensor) -> Tensor:
        """The final norm's output, (batch, length, d), with every adapter's result in its rows."""
        mixed = normed
        for part in self.parts:
            mixed = part.put(mixed, part.listener.end(part.at(normed)))
        return mixed
