"""Error and uncertainty of every supervised token, without ever holding the logits of a batch.

    error        e_t = -log p(y_t | y_<t)
    uncertainty  u_t = -sum_v p(v | y_<t) log p(v | y_<t)          both in nats (Q-Tuning, arXiv 2509.23873)

With s_v = logit_v - max logit, w_v = exp(s_v) and Z = sum_v w_v, one pass over the vocabulary gives both:
e = log Z - s_y and u = log Z - (w . s) / Z. The pass goes over chunks of supervised positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..head import causal_model, head_of, positions_at_once
from ..loss import supervised_positions

# Logits held at a time, whatever the vocabulary and the batch: 16 MiB of float32 where they should stay in a CPU's
# cache, 256 MiB where a GPU should have enough to do.
CHUNK_ELEMENTS = {"cpu": 2**22}
CHUNK_ELEMENTS_ELSEWHERE = 2**26


class TokenScores(NamedTuple):
    """Scores of supervised tokens, each (tokens,).

    Attributes:
        error: Negative log-likelihood in nats.
        uncertainty: Entropy of the prediction in nats.
        el2n: Length of the difference between the predicted distribution and the one-hot target (EL2N, Paul et al.,
            2021), if it was asked for.
    """

    error: Tensor
    uncertainty: Tensor
    el2n: Tensor | None = None


def scores_of_logits(logits: Tensor, targets: Tensor, el2n: bool = False) -> TokenScores:
    """Scores from logits, which are overwritten.

    Args:
        logits: (tokens, vocabulary), of any floating dtype; 16-bit ones are widened to float32.
        targets: (tokens,), int64.
        el2n: Whether to compute `el2n`.
    """
    shifted = logits.float() if logits.dtype.itemsize == 2 else logits
    shifted = shifted.sub_(shifted.amax(dim=-1, keepdim=True))  # (tokens, vocabulary)
    target = shifted.gather(-1, targets[:, None]).squeeze(-1)  # (tokens,)
    weights = shifted.exp()
    partition = weights.sum(dim=-1)
    log_partition = partition.log()
    error = log_partition - target
    uncertainty = log_partition - torch.linalg.vecdot(weights, shifted) / partition
    distance = None
    if el2n:
        collision = torch.linalg.vecdot(weights, weights) / partition.square()  # sum of p^2
        distance = (collision - 2 * (-error).exp() + 1).clamp_min(0).sqrt()
    return TokenScores(error, uncertainty.clamp_min(0), distance)


def token_scores(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, el2n: bool = False
) -> TokenScores:
    """Scores of every supervised token of a right-padded batch.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        input_ids: (batch, length), int64.
        attention_mask: (batch, length), or `None` without padding.
        labels: (batch, length), int64, -100 where a token is not supervised; the first of a row never is, as nothing
            predicts it.
        el2n: Whether to compute `el2n`.

    Returns:
        The scores, row after row.

    Raises:
        ValueError: when `model` is not a causal language model.
    """
    base = causal_model(model)
    output = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return scores_of_hidden_states(base, output, labels, el2n)


def scores_of_hidden_states(base: Any, output: Any, labels: Tensor, el2n: bool = False) -> TokenScores:
    """Scores from what the decoder of `base` returned; `labels` as in `token_scores`."""
    hidden_states, targets = supervised_positions(output.last_hidden_state, labels)
    elements = CHUNK_ELEMENTS.get(hidden_states.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    chunk = positions_at_once(base, elements)
    head = head_of(base, output)
    chunks = [
        scores_of_logits(head(states), wanted, el2n)
        for states, wanted in zip(hidden_states.split(chunk), targets.split(chunk), strict=True)
    ]
    return TokenScores(
        error=torch.cat([scores.error for scores in chunks]),
        uncertainty=torch.cat([scores.uncertainty for scores in chunks]),
        el2n=torch.cat([scores.el2n for scores in chunks if scores.el2n is not None]) if el2n else None,
    )
