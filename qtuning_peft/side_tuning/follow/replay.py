"""The loss of states that are there already: side networks and the head run, the base does not.

L = - 1/|T| sum_(t in T) log p(y_t | h_t),      h = mix(f_N, g_N) of the states that predict the tokens T

The states may come from a folder, or from one pass of the base that several side networks learn from.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...head import causal_model, head_of, positions_at_once
from ...loss import CHUNK_ELEMENTS, summed_cross_entropy, supervised_positions
from ...reading import positions_that_predict
from .follower import Listener, follower_of
from .positions import AtPositions
from .recorder import BaseStates


def stored_cross_entropy(
    model: Any, states: Tensor, labels: Tensor, num_items: Tensor | int | None = None, layers: Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood in nats of the tokens that stored states predict, under the active side network.

    Args:
        states: (N + 2, tokens, d): the embeddings, the tapped blocks' outputs, and the final norm's.
        labels: (1 + tokens,), int64; the first is predicted by nothing.
        num_items: Divisor instead of the number of tokens, for gradient accumulation.
        layers: (N,), int64, which blocks are tapped; by default, those that the side network reads.
    """
    follower = follower_of(model)
    listener = None if follower is None else follower.host.make_listener()
    if listener is None:
        raise ValueError("states are given, but no side network is active; activate one with set_adapter.")
    stored = sorted(listener.layers) if layers is None else layers.tolist()
    if len(states) != len(stored) + 2 or not {*listener.layers} <= {*stored}:
        raise ValueError(
            f"states holds {len(states)} parts, of blocks {stored}, but the active side network reads blocks "
            f"{sorted(listener.layers)}; compute states for its blocks."
        )
    found, targets = from_parts(model, states, labels, stored)
    total = replayed_cross_entropy(model, found, listener, targets)
    return total / (num_items if num_items is not None else max(1, len(targets)))


def from_parts(model: Any, states: Tensor, labels: Tensor, layers: Sequence[int]) -> tuple[BaseStates, Tensor]:
    """Stored `states` (N + 2, tokens, d) of the blocks `layers` as a pass of one row, and the targets (tokens,)."""
    weight = causal_model(model).get_output_embeddings().weight
    # However they were stored, they are those of a base in this dtype.
    embeddings, *taps, normed = states.to(weight.device, weight.dtype).unsqueeze(1)  # each (1, tokens, d)
    blocks = list(zip(layers, taps, strict=True))
    output = BaseModelOutputWithPast(last_hidden_state=normed)
    return BaseStates(layers, embeddings, blocks, normed, output), labels[1:].to(weight.device)


@torch.no_grad()
def from_pass(model: Any, layers: Collection[int], labels: Tensor, **inputs: Any) -> tuple[BaseStates, Tensor]:
    """The states of the blocks `layers` from one pass of the base on `inputs`, where `labels` (batch, length) are read.

    Returns:
        The states (1, tokens, d), and the targets (tokens,).
    """
    follower, states, base = follower_of(model), BaseStates(layers), causal_model(model)
    assert follower is not None
    with follower.recording(AtPositions(states, positions_that_predict(labels))):
        states.output = base.get_decoder()(use_cache=False, **inputs)
    return states, supervised_positions(states.output.last_hidden_state, labels)[1]


def replayed_cross_entropy(model: nn.Module, states: BaseStates, listener: Listener, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods in nats of `targets` (tokens,) under the side network of `listener`."""
    base = causal_model(model)
    hidden_states = states.replay(listener)["last_hidden_state"].flatten(0, 1)  # (tokens, d)
    frozen = not any(parameter.requires_grad for parameter in base.get_output_embeddings().parameters())
    chunk = positions_at_once(base, CHUNK_ELEMENTS)
    return summed_cross_entropy(head_of(base, states.output), hidden_states, targets, chunk, frozen)
