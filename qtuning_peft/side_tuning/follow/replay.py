"""The loss of stored states: the side network and the head run, the base does not.

L = - 1/|T| sum_(t in T) log p(y_t | h_t),      h = mix(f_N, g_N) of the states that predict the tokens T
"""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...head import causal_model, head_of, positions_at_once
from ...loss import CHUNK_ELEMENTS, summed_cross_entropy
from .follower import follower_of
from .recorder import BaseStates


def stored_cross_entropy(model: Any, states: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean negative log-likelihood in nats of the tokens that stored states predict, under the active side network.

    Args:
        states: (N + 2, tokens, d): the embeddings, the tapped blocks' outputs, and the final norm's.
        labels: (1 + tokens,), int64; the first is predicted by nothing.
        num_items: Divisor instead of the number of tokens, for gradient accumulation.
    """
    follower, base = follower_of(model), causal_model(model)
    listener = None if follower is None else follower.host.make_listener()
    if listener is None or len(states) != len(listener.layers) + 2:
        raise ValueError(
            f"states holds {len(states)} parts, but the active side network reads "
            f"{0 if listener is None else len(listener.layers) + 2}; compute states for its blocks."
        )
    weight = base.get_output_embeddings().weight
    # However they were stored, they are those of a base in this dtype.
    embeddings, *taps, normed = states.to(weight.device, weight.dtype).unsqueeze(1)  # each (1, tokens, d)
    output = BaseModelOutputWithPast(last_hidden_state=normed)
    blocks = list(zip(sorted(listener.layers), taps, strict=True))
    result = BaseStates(listener.layers, embeddings, blocks, normed, output).replay(listener)
    labels = labels[1:].to(weight.device)
    hidden_states = result.last_hidden_state[0]  # (tokens, d)
    frozen = not any(parameter.requires_grad for parameter in base.get_output_embeddings().parameters())
    chunk = positions_at_once(base, CHUNK_ELEMENTS)
    total = summed_cross_entropy(head_of(base, output), hidden_states, labels, chunk, frozen)
    return total / (num_items if num_items is not None else max(1, len(labels)))
