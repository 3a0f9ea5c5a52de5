"""Stage 2: which tokens of a sample are kept.

    s_i = (1 - lambda) PPL_i + lambda (PPL_(i-1) + PPL_(i+1)) / 2,      PPL_i = exp(e_i)

(Q-Tuning, arXiv 2509.23873; at both ends the missing neighbour is the token itself.) The lowest scores are kept: the
paper's text says "top", its purpose, "removing locally detrimental or noisy tokens", and the published code say lowest.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..registry import Registry
from .selection import Options
from .strategies import row_hash

Row = Mapping[str, Any]
Ranking = Callable[[Row, Options], np.ndarray]


@dataclass(frozen=True)
class TokenStrategy:
    """The columns that a ranking reads, and it: from (row, options) to (supervised tokens,), the lowest kept."""

    columns: tuple[str, ...]
    scores: Ranking


TOKEN_STRATEGIES: Registry[TokenStrategy] = Registry("token_strategy")


def token_strategy(name: str, *columns: str) -> Callable[[Ranking], Ranking]:
    """Decorator: register a function of (row, options) that scores a row's supervised tokens, the lowest kept.

    Of the `columns` that it reads, those that a score provides are computed for it.
    """

    def register(function: Ranking) -> Ranking:
        TOKEN_STRATEGIES.add(name, TokenStrategy(columns, function), function.__doc__)
        return function

    return register


@token_strategy("neighbours", "token_error")
def neighbours(row: Row, options: Options) -> np.ndarray:
    """Lowest perplexity of a token and its neighbours (Q-Tuning)."""
    return neighbour_scores(np.asarray(row["token_error"]), options.neighbour_weight)


@token_strategy("random", "input_ids", "token_error")
def random(row: Row, options: Options) -> np.ndarray:
    """Any tokens, drawn by a row's tokens and the seed."""
    rng = np.random.default_rng(int(row_hash(row["input_ids"], options.seed) * 2**53))
    return rng.random(len(row["token_error"]))


@token_strategy("rho1", "token_error", "token_reference_error")
def rho1(row: Row, options: Options) -> np.ndarray:
    """Highest excess error over a reference model (Rho-1, Lin et al., NeurIPS 2024)."""
    return np.asarray(row["token_reference_error"], np.float64) - np.asarray(row["token_error"], np.float64)


def neighbour_scores(token_error: np.ndarray, neighbour_weight: float = 0.5) -> np.ndarray:
    """Neighbour-aware perplexity s (tokens,) from `token_error` (tokens,), nats, and lambda, `neighbour_weight`."""
    # Far below float64's end, so that sums stay finite; nothing real is less likely than e^-300.
    perplexity = np.exp(np.minimum(token_error.astype(np.float64), 300.0))
    if not len(perplexity):
        return perplexity
    padded = np.pad(perplexity, 1, mode="edge")
    return (1 - neighbour_weight) * perplexity + neighbour_weight * (padded[:-2] + padded[2:]) / 2


def kept_counts(tokens: Any, token_ratio: float) -> np.ndarray:
    """How many of `tokens` (samples,) supervised tokens stay: the nearest count, at least one."""
    return np.where(tokens > 0, np.maximum(1, np.floor(tokens * token_ratio + 0.5)), 0)


def keep_lowest(scores: np.ndarray, token_ratio: float, protected: np.ndarray) -> np.ndarray:
    """Mark the tokens with the lowest scores, earlier ones first among equals.

    Args:
        scores: (tokens,).
        token_ratio: Share to keep, in (0, 1].
        protected: (tokens,), bool: kept whatever their score. They count towards the share, and may exceed it.
    """
    count = int(kept_counts(len(scores), token_ratio))
    ranked = np.lexsort((np.arange(len(scores)), scores, ~protected))
    kept = protected.copy()
    kept[ranked[:count]] = True
    return kept


def protected_tokens(tokenizer: Any, tokens: Sequence[int], patterns: Sequence[str]) -> np.ndarray:
    """Which of `tokens` are special, or stand for text that one of the regular expressions matches: (tokens,), bool."""
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
    if unknown := [token for token in tokens if not 0 <= token < 2**32]:
        raise ValueError(
            f"A row has the token {unknown[0]}, which no tokenizer knows; repair its input_ids and labels."
        )
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
