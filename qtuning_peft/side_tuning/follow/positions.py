"""A listener for the positions alone that a loss reads.

    h[t] = mix(f[t], g[t])      t read,         h[t] = f[t]      elsewhere

A side network whose blocks do not attend computes each position by itself, so that the others need not be computed, nor
saved for backward: memory and time fall with the share of supervised tokens, whatever the prompts' length.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from .follower import BlockCall, Listener

# Of all positions: picking out more costs more than computing the rest.
MOST = 0.9


class AtPositions:
    """Hands a listener, of every (batch, length, d), (1, tokens, d): those of `read` (batch, length), bool.

    See [`Listener`].
    """

    def __init__(self, listener: Listener, read: Tensor) -> None:
        self.listener, self.read = listener, read
        self.layers: Collection[int] = listener.layers
        # Some bases put tokens of their own in front (CPM-Ant): then all positions are handed on.
        self.matches = True
        self.rows, self.columns = read.nonzero(as_tuple=True)  # each (tokens,)

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """Hand on the embeddings."""
        self.matches = embeddings.shape[:2] == self.read.shape
        self.listener.begin(self.at(embeddings), call)

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> None:
        """Hand on a block's output."""
        self.listener.block(index, self.at(hidden_states), call)

    def end(self, normed: Tensor) -> Tensor:
        """The final norm's output, (batch, length, d), with the listener's result in its places."""
        mixed = self.listener.end(self.at(normed))
        return self.put(normed, mixed) if self.matches else mixed

    def put(self, whole: Tensor, states: Tensor) -> Tensor:
        """`whole` (batch, length, d) with `states` (1, tokens, d) in their places."""
        rows, columns = self.rows.to(whole.device), self.columns.to(whole.device)
        result = whole.to(states.dtype).index_put((rows, columns), states[0])
        if result.requires_grad:
            result.register_hook(self._refuse_reading)
        return result

    def at(self, states: Tensor) -> Tensor:
        """Of (batch, length, d) those that are read, (1, tokens, d)."""
        if not self.matches:
            return states
        return states[self.rows.to(states.device), self.columns.to(states.device)].unsqueeze(0)

    def _refuse_reading(self, gradient: Tensor) -> None:
        if bool((gradient.ne(0).any(-1) & ~self.read.to(gradient.device)).any()):
            raise RuntimeError(
                "The loss reads positions that its labels do not supervise (of a classifier: other than a row's last "
                "token), where the side network did not run; give the model no labels, and compute the loss from its "
                "logits, or read a classifier's logits at the last token."
            )


def at_read_positions(listener: Listener, read: Tensor | None) -> Listener:
    """`listener` for the positions `read` (batch, length), bool; itself for most, none, and where nothing is known."""
    # How many there are is data, which a graph of torch.compile cannot hold.
    if read is None or torch.compiler.is_compiling():
        return listener
    found = AtPositions(listener, read)
    return found if 0 < len(found.rows) < MOST * read.numel() else listener
