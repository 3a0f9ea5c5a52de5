"""The listener that records what the frozen base computes for a batch: the side network can learn from it again.

The base never changes (QST, ACL 2024), so neither do its hidden states. Computed once for some other purpose, such as
scoring a batch on the Error-Uncertainty plane, they serve the training step too, for all rows or for the chosen ones.
Replaying them is calling a listener without a base.
"""

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..network.attention import READ_ARGUMENTS
from .follower import BlockCall, Listener, follower_of


@dataclass
class BaseStates:
    """The base's states for one batch; see [`Listener`].

    Attributes:
        layers: Indices of the blocks that are recorded.
        input_ids: (batch, length), int64.
        inputs: What else the decoder was given, such as `attention_mask` (batch, length).
        embeddings: Input of the first block, (batch, length, d).
        blocks: Of every recorded block its index, its output (batch, length, d), and of its call what side blocks read.
        normed: Output of the final norm, (batch, length, d).
        output: What the decoder returned.
    """

    layers: Collection[int]
    input_ids: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    embeddings: Tensor | None = None
    blocks: list[tuple[int, Tensor, BlockCall]] = field(default_factory=list)
    normed: Tensor | None = None
    output: Any = None

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """Record the embeddings."""
        self.embeddings = embeddings

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> None:
        """Record a block's output, and of its arguments what a side block beside it reads."""
        read = {name: call.arguments[name] for name in READ_ARGUMENTS if call.arguments.get(name) is not None}
        self.blocks.append((index, hidden_states, BlockCall(call.block, read)))

    def end(self, normed: Tensor) -> Tensor:
        """Record the final norm's output."""
        self.normed = normed
        return normed

    def replay(self, listener: Listener | None) -> Any:
        """Notify `listener` of all of it again; returns what the decoder would then return."""
        assert self.embeddings is not None
        assert self.normed is not None
        if listener is None:
            return self._output_with(self.normed)
        listener.begin(self.embeddings, BlockCall())
        for recorded in self.blocks:
            listener.block(*recorded)
        return self._output_with(listener.end(self.normed))

    def rows(self, chosen: Tensor) -> "BaseStates":
        """The states of the rows `chosen` (rows,), int64, alone."""
        batch = self.input_ids.shape[0]
        # Blocks share one mask and one pair of rotary tensors, and side blocks rely on that: each is indexed once.
        indexed: dict[int, Any] = {}

        def of(value: Any) -> Any:
            if id(value) not in indexed:
                if isinstance(value, tuple):
                    indexed[id(value)] = tuple(of(part) for part in value)
                elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch > 1:
                    indexed[id(value)] = value[chosen.to(value.device)]
                else:
                    indexed[id(value)] = value
            return indexed[id(value)]

        def each(values: dict[str, Any]) -> dict[str, Any]:
            return {name: of(value) for name, value in values.items()}

        result = replace(
            self, input_ids=of(self.input_ids), inputs=each(self.inputs), embeddings=of(self.embeddings),
            blocks=[(index, of(h), BlockCall(call.block, each(call.arguments))) for index, h, call in self.blocks],
            normed=of(self.normed),
        )  # fmt: skip
        if result.normed is not None:
            result.output = result._output_with(result.normed)
        return result

    def taps(self) -> list[Tensor]:
        """The embeddings and the recorded blocks' outputs, each (batch, length, d)."""
        assert self.embeddings is not None
        return [self.embeddings, *(hidden_states for _, hidden_states, _ in self.blocks)]

    def _output_with(self, hidden_states: Tensor) -> Any:
        output = copy(self.output)
        output["last_hidden_state"] = hidden_states
        return output


@torch.no_grad()
def record_states(model: nn.Module, input_ids: Tensor, **inputs: Any) -> BaseStates:
    """Run the base of a side-tuned model on `input_ids` (batch, length), and record its states.

    `inputs` are further arguments of the decoder, such as `attention_mask`; the side network does not run.
    """
    follower = follower_of(model)
    network = None if follower is None else follower.host.active_network()
    if follower is None or network is None:
        raise ValueError(f"{type(model).__name__} has no active side network, so no states are read.")
    states = BaseStates(network.layers, input_ids, inputs)
    with follower.recording(states):
        states.output = follower.decoder(input_ids=input_ids, use_cache=False, **inputs)
    return states
