"""Stage 2: which tokens of a sample are kept.

    s_i = (1 - lambda) PPL_i + lambda (PPL_(i-1) + PPL_(i+1)) / 2,      PPL_i = exp(e_i)

(Q-Tuning, arXiv 2509.23873; at both ends the missing neighbour is the token itself.) The lowest scores are kept: the
paper's text says "top", its purpose, "removing locally detrimental or noisy tokens", and the published code say lowest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def neighbour_scores(token_error: np.ndarray, neighbour_weight: float = 0.5) -> np.ndarray:
    """Neighbour-aware perplexity of every token.

    Args:
        token_error: (tokens,), nats.
        neighbour_weight: The lambda of the equation, 0 to 1.

    Returns:
        (tokens,), float64.
    """
    # Far below float64's end, so that sums stay finite; nothing real is less likely than e^-300.
    perplexity = np.exp(np.minimum(token_error.astype(np.float64), 300.0))
    if not len(perplexity):
        return perplexity
    padded = np.pad(perplexity, 1, mode="edge")
    return (1 - neighbour_weight) * perplexity + neighbour_weight * (padded[:-2] + padded[2:]) / 2


def kept_counts(tokens: np.ndarray, token_ratio: float) -> np.ndarray:
    """How many of `tokens` (samples,) supervised tokens stay: the nearest count, at least one."""
    return np.where(tokens > 0, np.maximum(1, np.floor(tokens * token_ratio + 0.5)), 0)


def keep_lowest(scores: np.ndarray, token_ratio: float, protected: np.ndarray) -> np.ndarray:
    """Mark the tokens with the lowest scores, earlier ones first among equals.

    Args:
        scores: (tokens,).
        token_ratio: Share to keep, in (0, 1].
        protected: (tokens,), bool: kept whatever their score. They count towards the share, and may exceed it.

    Returns:
        (tokens,), bool.
    """
    count = int(kept_counts(np.array(len(scores)), token_ratio))
    ranked = np.lexsort((np.arange(len(scores)), scores, ~protected))
    kept = protected.copy()
    kept[ranked[:count]] = True
    return kept


def protected_tokens(tokenizer: Any, tokens: Sequence[int], patterns: Sequence[str]) -> np.ndarray:
    """Which tokens are special, or stand for text that one of `patterns` matches.

    Args:
        tokenizer: The model's tokenizer.
        tokens: (tokens,).
        patterns: Regular expressions.

    Returns:
        (tokens,), bool.
    """
    protected = np.isin(tokens, tokenizer.all_special_ids)
    if patterns:
        pieces = pieces_of(tokenizer, tokens)
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        for pattern in patterns:
            for match in re.finditer(pattern, "".join(pieces)):
                if match.group():
                    protected |= (starts < match.end()) & (ends > match.start())
    return protected


def pieces_of(tokenizer: Any, tokens: Sequence[int], context: int = 8) -> list[str]:
    """The text each of `tokens` adds to what stands before it.

    Decoded with a few tokens of context, as some tokenizers lose the leading space of a token that stands alone. A
    character that is spread over several tokens belongs to the last of them.
    """
    pieces: list[str] = []
    complete = 0  # tokens whose text is out
    for end in range(1, len(tokens) + 1):
        start = max(0, complete - context)
        text = tokenizer.decode(list(tokens[start:end]))
        if text.endswith("\ufffd") and end < len(tokens) and end - complete < context:
            pieces.append("")
            continue
        pieces.append(text[len(tokenizer.decode(list(tokens[start:complete]))) :])
        complete = end
    return pieces


def without_tokens(row: Mapping[str, Any], stays: np.ndarray) -> dict[str, Any]:
    """The per-token columns of `row` with only the tokens of `stays` (length,), positions counted anew."""
    per_token = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "token_type_ids")
    result: dict[str, Any] = {
        name: np.asarray(row[name])[stays].tolist() for name in per_token if row.get(name) is not None
    }
    if row.get("position_ids") is not None:
        starts = np.flatnonzero(np.asarray(row["position_ids"]) == 0)
        sizes = [int(part.sum()) for part in np.split(stays, starts[1:])]
        result["position_ids"] = [position for size in sizes for position in range(size)]
    if row.get("seq_lengths") is not None:
        ends = np.cumsum(row["seq_lengths"])
        result["seq_lengths"] = [int(part.sum()) for part in np.split(stays, ends[:-1])]
    return result
