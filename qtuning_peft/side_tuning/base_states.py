"""What the frozen base computes for a batch, kept: the side network can learn from it without the base running again.

The base never changes (QST, ACL 2024), so neither do its hidden states. Computed once for some other purpose, such as
scoring a batch on the Error-Uncertainty plane, they serve the training step too, for all rows or for the chosen ones.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .block import ATTENTION_ARGUMENTS

if TYPE_CHECKING:
    from .layer import SideTuningLayer

MAX_WAITING = 2
# Arguments of a decoder that ask for, or bring, more than was kept.
MORE_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits", "past_key_values")
# Of a block's arguments, what its side block reads.
READ_BY_SIDE_BLOCK = ("attention_mask", "position_embeddings", *ATTENTION_ARGUMENTS)


@dataclass
class BaseStates:
    """The base's states for one batch.

    Attributes:
        input_ids: (batch, length), int64.
        inputs: What else the decoder was given, such as `attention_mask` (batch, length).
        embeddings: Input of the first block, (batch, length, d).
        blocks: For every tapped block the block, its arguments that side blocks read, and its output
            (batch, length, d).
        normed: Output of the final norm, (batch, length, d).
        output: What the decoder returned.
    """

    input_ids: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    embeddings: Tensor | None = None
    blocks: list[tuple[nn.Module, dict[str, Any], Tensor]] = field(default_factory=list)
    normed: Tensor | None = None
    output: Any = None

    def add_block(self, block: nn.Module, arguments: dict[str, Any], hidden_states: Tensor) -> None:
        """Keep what a tapped block was given and what it returned, (batch, length, d)."""
        read = {name: arguments[name] for name in READ_BY_SIDE_BLOCK if arguments.get(name) is not None}
        self.blocks.append((block, read, hidden_states))

    def rows(self, chosen: Tensor) -> BaseStates:
        """The states of the rows `chosen` (rows,), int64, alone."""
        batch = self.input_ids.shape[0]
        # Blocks share one mask and one pair of rotary tensors, and side blocks rely on that: each is indexed once.
        indexed: dict[int, Any] = {}

        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                if id(value) not in indexed:
                    indexed[id(value)] = tuple(of(part) for part in value)
                return indexed[id(value)]
            if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != batch or batch == 1:
                return value
            if id(value) not in indexed:
                indexed[id(value)] = value[chosen.to(value.device)]
            return indexed[id(value)]

        result = replace(
            self,
            input_ids=of(self.input_ids),
            inputs={name: of(value) for name, value in self.inputs.items()},
            embeddings=of(self.embeddings),
            blocks=[
                (block, {name: of(value) for name, value in arguments.items()}, of(hidden_states))
                for block, arguments, hidden_states in self.blocks
            ],
            normed=of(self.normed),
        )
        if result.normed is not None:
            result.output = result.output_with(result.normed)
        return result

    def are_for(self, input_ids: Any, arguments: dict[str, Any]) -> bool:
        """Whether a decoder called with `input_ids` (batch, length) and `arguments` would compute these states."""
        if any(arguments.get(name) for name in MORE_OUTPUTS) or not _same(self.input_ids, input_ids):
            return False
        return _same(self.inputs.get("attention_mask"), arguments.get("attention_mask")) and (
            # Some models count positions themselves before they call their decoder.
            self.inputs.get("position_ids") is None or _same(self.inputs["position_ids"], arguments.get("position_ids"))
        )

    def output_with(self, hidden_states: Tensor) -> Any:
        """What the decoder would return with `hidden_states` (batch, length, d) as its last."""
        output = copy(self.output)
        output["last_hidden_state"] = hidden_states
        return output


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second.to(first.device))
    return first is second


def side_tuning_layer(model: nn.Module) -> SideTuningLayer | None:
    """The side network's seat in `model`, if it has one."""
    from .layer import SideTuningLayer

    return next((module for module in model.modules() if isinstance(module, SideTuningLayer)), None)


@torch.no_grad()
def base_states(model: nn.Module, input_ids: Tensor, **inputs: Any) -> BaseStates:
    """Run the base of a side-tuned model, without its side network, and keep its states.

    Args:
        model: A causal language model with an active side network, PEFT's wrapper around it or not.
        input_ids: (batch, length), int64.
        **inputs: Further arguments of the decoder, such as `attention_mask` (batch, length).

    Returns:
        The states. `output.last_hidden_state` is the base's own.

    Raises:
        ValueError: when `model` has no active side network.
    """
    layer = side_tuning_layer(model)
    if layer is None or layer.active_network() is None:
        raise ValueError(f"{type(model).__name__} has no active side network, so no states are read.")
    states = BaseStates(input_ids, inputs)
    with layer.recording(states):
        states.output = layer.decoder(input_ids=input_ids, use_cache=False, **inputs)
    return states


def use_in_next_forward(model: nn.Module, states: BaseStates) -> None:
    """Let the model's next forward pass over the same input, in training mode, take `states` for the base's.

    At most two wait, each for its own input, as trainers fetch one batch ahead of the step: more would cost more memory
    than the base's pass costs time. One that is taken makes those that waited longer go away.
    """
    layer = side_tuning_layer(model)
    assert layer is not None
    layer.waiting_states = [*layer.waiting_states, states][-MAX_WAITING:]
