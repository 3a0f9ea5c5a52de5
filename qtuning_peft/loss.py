"""Chunked cross-entropy of a causal language model, over its supervised positions: never all of their logits at once.

    L = - 1/|T| sum_(t in T) log p(y_t | y_<t),      T = {t : label_t != -100}

The head is applied to the hidden states that predict a supervised token and to no others, a chunk of them at a time.
Nothing in the head is trained, so a chunk's gradient can be taken at once, in the forward pass: dL/dh is all that
is saved for backward, d numbers a token instead of several times the vocabulary, and no logit is computed twice.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .head import causal_model, head_of, positions_at_once, read_in_front
from .reading import IGNORE_INDEX, reading_labels
from .sharding import most

__all__ = ["IGNORE_INDEX", "chunked_cross_entropy", "summed_cross_entropy", "supervised_positions"]

# Logits of a chunk: with their softmax and gradient, about half a gigabyte in float32 and a few hundred tokens.
CHUNK_ELEMENTS = 2**25
Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    model: nn.Module, input_ids: Tensor, labels: Tensor, num_items: Tensor | int | None = None, **inputs: Any
) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens, in nats.

    Args:
        input_ids: (batch, length), int64.
        labels: (batch, length), int64, -100 where a token is not supervised. They are shifted here.
        num_items: Divisor instead of the number of supervised tokens, for gradient accumulation.

    Returns:
        The loss, a float32 scalar; zero for a batch without supervised tokens.

    Raises:
        ValueError: for inputs that the decoder does not read, such as pictures: its head alone would not see them.
    """
    base = causal_model(model)
    if unread := sorted(read_in_front(base) & {name for name, value in inputs.items() if value is not None}):
        raise ValueError(f"{unread[0]} is not read by the decoder of {type(base).__name__}; use the model's own loss.")
    with reading_labels(labels):
        output = base.get_decoder()(input_ids=input_ids, use_cache=False, **inputs)
    hidden_states, targets = supervised_positions(output.last_hidden_state, labels)
    frozen = not any(parameter.requires_grad for parameter in base.get_output_embeddings().parameters())
    chunk = positions_at_once(base, CHUNK_ELEMENTS)
    # A sharded head is run equally often by all processes.
    chunks = most(-(-len(targets) // chunk), base, hidden_states)
    total = summed_cross_entropy(head_of(base, output), hidden_states, targets, chunk, frozen, chunks)
    return total / (num_items if num_items is not None else max(1, len(targets)))


def supervised_positions(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a supervised token, and the tokens.

    Args:
        hidden_states: (batch, length, d).
        labels: (batch, length), int64, -100 where a token is not supervised.

    Returns:
        (tokens, d) and (tokens,), row after row.
    """
    targets = labels[:, 1:].to(hidden_states.device)
    supervised = targets != IGNORE_INDEX
    return hidden_states[:, :-1][supervised], targets[supervised]


def summed_cross_entropy(
    head: Head, hidden_states: Tensor, targets: Tensor, chunk: int, frozen: bool, chunks: int = 0
) -> Tensor:
    """Sum of the targets' negative log-likelihoods in nats, a float32 scalar (float64 for float64 logits).

    Args:
        head: From hidden states (tokens, d) to logits (tokens, vocabulary).
        hidden_states: (tokens, d).
        targets: (tokens,), int64.
        chunk: Tokens whose logits are held at a time.
        frozen: Whether nothing in `head` needs a gradient. If something does, backward computes logits once more.
        chunks: Run `head` that often at least, on no tokens behind the last.
    """
    if frozen and hidden_states.requires_grad and torch.is_grad_enabled():
        total: Tensor = _FrozenHead.apply(hidden_states, targets, head, chunk, chunks)
        return total
    total = hidden_states.new_zeros((), dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for here in _chunks(len(targets), chunk, chunks):
        total = total + checkpoint(_summed, head, hidden_states[here], targets[here], use_reentrant=False)
    return total


def _chunks(tokens: int, size: int, least: int) -> Iterator[slice]:
    for start in range(0, max(tokens, least * size), size):
        yield slice(start, start + size)


def _summed(head: Head, hidden_states: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden_states)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, targets: Tensor, head: Head, chunk: int, chunks: int) -> Tensor:
        gradient = torch.empty_like(hidden_states)  # (tokens, d)
        total = hidden_states.new_zeros((), dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for here in _chunks(len(hidden_states), chunk, chunks):
            with torch.enable_grad():
                states = hidden_states[here].detach().requires_grad_()
                loss = _summed(head, states, targets[here])
            (gradient[here],) = torch.autograd.grad(loss, states)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None
