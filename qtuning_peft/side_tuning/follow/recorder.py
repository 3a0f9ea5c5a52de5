"""The listener that records what the frozen base computes for a batch: the side network can learn from it again.

The base never changes (QST, ACL 2024), so neither do its hidden states. Computed once, in the first epoch or to fit a
projection, they can be used again. Replaying them is calling a listener without a base; a side network that attends
reads more of the base than what is recorded.
"""

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .follower import BlockCall, Listener, follower_of


@dataclass
class BaseStates:
    """The base's states for one batch; see [`Listener`].

    Attributes:
        layers: Indices of the blocks that are recorded.
        embeddings: Input of the first block, (batch, length, d).
        blocks: Of every recorded block its index and its output (batch, length, d).
        normed: Output of the final norm, (batch, length, d).
        output: What the decoder returned.
    """

    layers: Collection[int]
    embeddings: Tensor | None = None
    blocks: list[tuple[int, Tensor]] = field(default_factory=list)
    normed: Tensor | None = None
    output: Any = None

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """Record the embeddings."""
        self.embeddings = embeddings

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> None:
        """Record a block's output."""
        self.blocks.append((index, hidden_states))

    def end(self, normed: Tensor) -> Tensor:
        """Record the final norm's output."""
        self.normed = normed
        return normed

    def replay(self, listener: Listener) -> Any:
        """Notify `listener` of all that it wants of it; returns what the decoder would then return."""
        assert self.embeddings is not None
        assert self.normed is not None
        listener.begin(self.embeddings, BlockCall())
        for index, hidden_states in self.blocks:
            if index in listener.layers:
                listener.block(index, hidden_states, BlockCall())
        output = copy(self.output)
        output["last_hidden_state"] = listener.end(self.normed)
        return output

    def parts(self) -> list[Tensor]:
        """Embeddings, taps and the final norm's output, each (batch, length, d)."""
        assert self.normed is not None
        return [*self.taps(), self.normed]

    def with_parts(self, parts: Tensor) -> "BaseStates":
        """The same with other `parts` (N + 2, batch, length, d), each on its device and in its dtype."""
        embeddings, *taps, normed = (part.to(own) for part, own in zip(parts, self.parts(), strict=True))
        blocks = [(index, tap) for (index, _), tap in zip(self.blocks, taps, strict=True)]
        return replace(self, embeddings=embeddings, blocks=blocks, normed=normed)

    def taps(self) -> list[Tensor]:
        """The embeddings and the recorded blocks' outputs, each (batch, length, d)."""
        assert self.embeddings is not None
        return [self.embeddings, *(hidden_states for _, hidden_states in self.blocks)]


@torch.no_grad()
def record_states(model: nn.Module, input_ids: Tensor, **inputs: Any) -> BaseStates:
    """Run the base of a side-tuned model on `input_ids` (batch, length), and record its states.

    `inputs` are further arguments of the decoder, such as `attention_mask`; the side network does not run.
    """
    follower = follower_of(model)
    network = None if follower is None else follower.host.active_network()
    if follower is None or network is None:
        raise ValueError(f"{type(model).__name__} has no active side network, so no states are read.")
    states = BaseStates(network.layers)
    with follower.recording(states):
        states.output = follower.decoder(input_ids=input_ids, use_cache=False, **inputs)
    return states
